import pytest

from hf_fae.utils.home import expand_home


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("~/images", "/home/user/images"),
        ("--output=~/images", "/home/user/images"),
        ("images/~/a", "images/~/a"),
        ("--prompt=a ~/b", "a ~/b"),
        ("~other", "~other"),
    ],
)
def test_only_paths_that_begin_at_home_change(argument, expected, monkeypatch):
    monkeypatch.setenv("HOME", "/home/user")
    assert expand_home(argument).rpartition("=")[2] == expected
    assert expand_home(argument).partition("=")[0] == (argument.partition("=")[0] if "=" in argument else expected)
