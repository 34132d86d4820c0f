"""Which paths the rows of a data set may name."""

import pytest

from hf_fae.data.corrupt import CorruptRow
from hf_fae.data.own_paths import check_inside


@pytest.mark.parametrize("path", ["/data/photos/a.png", "/data/photos/b/../a.png", "zip://a.png::/data/photos/a.zip"])
def test_paths_inside(path):
    check_inside(path, "/data/photos")


@pytest.mark.parametrize(
    "path",
    [
        "hf://datasets/user/name/a.png",
        "zip://a.png::hf://datasets/user/name@main/a.zip",
        "gzip://a.png::hf://datasets/user/name@main/a.png.gz",
    ],
)
@pytest.mark.parametrize("dataset_name", ["user/name", "hf://datasets/user/name"])
def test_urls_inside(path, dataset_name):
    check_inside(path, dataset_name)


def test_the_copy_of_a_repository_is_inside_but_no_other_one():
    from huggingface_hub.constants import HF_HUB_CACHE

    check_inside(f"{HF_HUB_CACHE}/datasets--user--name/snapshots/0/a.png", "user/name")
    with pytest.raises(CorruptRow, match="outside of the data set"):
        check_inside(f"{HF_HUB_CACHE}/datasets--user--other/snapshots/0/a.png", "user/name")


@pytest.mark.parametrize(
    "path",
    [
        "/data/photos/../secret.png",
        "/data/photos2/a.png",
        "/etc/passwd",
        "file:///data/photos/a.png",
        "http://127.0.0.1/a.png",
        "hf://datasets/user/name2/a.png",
        "hf://datasets/user/name/../name2/a.png",
        "hf://user/name/a.png",
        "zip://a.png::http://127.0.0.1/a.zip",
        "file:///etc/passwd::/data/photos/a.zip",
        "http://127.0.0.1/a.png::hf://datasets/user/name/a.zip",
        "zip://a.png::file:///etc/a.zip::hf://datasets/user/name/a.zip",
        "filecache::http://127.0.0.1/a.png::/data/photos/a.png",
    ],
)
def test_paths_outside(path):
    for dataset_name in ("/data/photos", "user/name"):
        with pytest.raises(CorruptRow, match="outside of the data set") as raised:
            check_inside(path, dataset_name)
        assert raised.value.kind == "unsafe"


def test_a_linked_folder_and_the_folder_of_a_file_are_the_data_sets_own(tmp_path):
    """`datasets` resolves the links of a folder's own path."""
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "rows.csv").touch()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for dataset_name in ("link", "real", "real/rows.csv", "link/rows.csv"):
        check_inside(f"{tmp_path}/real/a.png", f"{tmp_path}/{dataset_name}")
        with pytest.raises(CorruptRow, match="outside"):
            check_inside(f"{tmp_path}/a.png", f"{tmp_path}/{dataset_name}")
