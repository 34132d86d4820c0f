"""The fixtures of training tests."""

from training_fixtures import *  # noqa: F403 - fixtures
