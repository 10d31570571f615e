"""The options: defaults, every allowed value, and the text of every refusal."""

from __future__ import annotations

import dataclasses
import inspect
import math
import pickle
import re
import warnings
from typing import Any

import pytest

from lrcnn_lightning.config import RowConfig, did_you_mean, format_count, format_size, parse_size, strategy_defaults
from lrcnn_lightning.errors import ConfigError, RowwiseError

DEFAULTS = {
    "mode": "auto",
    "rows": "auto",
    "segments": "auto",
    "batch_chunks": "auto",
    "memory_budget": "auto",
    "max_overhead": 0.35,
    "axis": "auto",
    "modules": "auto",
    "on_unsupported": "error",
}
COUNTS = ("rows", "segments", "batch_chunks")


class ListLike:
    """A list that is no ``Sequence``, as the containers of configuration libraries are."""

    def __init__(self, *items: object) -> None:
        self.items = items

    def __iter__(self) -> Any:
        return iter(self.items)


def refusal(**options: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        RowConfig.from_options(**options)
    return str(caught.value)


# Fields


def test_defaults_are_the_promised_ones_in_the_promised_order() -> None:
    assert dataclasses.asdict(RowConfig()) == DEFAULTS
    assert [field.name for field in dataclasses.fields(RowConfig)] == list(DEFAULTS)


def test_the_default_of_an_option_may_depend_on_who_asks() -> None:
    """A strategy does not end a training that plain PyTorch does not end."""
    assert strategy_defaults() == {**DEFAULTS, "on_unsupported": "warn"}


def test_every_field_is_documented() -> None:
    text = inspect.getdoc(RowConfig) or ""
    for name in DEFAULTS:
        assert re.search(rf"^    {name}: ", text, re.MULTILINE), name


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *[("mode", mode) for mode in ("auto", "two_phase", "overlap")],
        *[(option, value) for option in COUNTS for value in ("auto", 1, 8, 10**6)],
        *[("memory_budget", value) for value in (None, "auto", 1, 6 * 2**30, "6GiB", "512 MB", "1e9")],
        *[("max_overhead", value) for value in (0.0, 0.35, 2.0, math.inf)],
        *[("axis", value) for value in ("auto", 1, 2, 3, 4, -1, -2)],
        ("modules", "auto"),
        *[("on_unsupported", value) for value in ("error", "warn")],
    ],
)
def test_allowed_values_are_kept_as_they_are(option: str, value: object) -> None:
    assert getattr(RowConfig.from_options(**{option: value}), option) == value


def test_frozen_hashable_comparable_and_picklable() -> None:
    config = RowConfig(mode="overlap", rows=4, modules=["backbone", "head"])
    assert config == RowConfig(mode="overlap", rows=4, modules=("backbone", "head"))
    assert hash(config) == hash(pickle.loads(pickle.dumps(config)))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.rows = 5  # type: ignore[misc]


def test_replace_checks_again() -> None:
    with pytest.raises(ConfigError):
        dataclasses.replace(RowConfig(), rows=0)


# Refusals


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("mode", "two_phases", ['mode must be one of "auto", "two_phase", "overlap"', "'two_phases'", '"two_phase"?']),
        ("mode", "Two-Phase", ['did you mean "two_phase"?']),
        ("mode", "2PS", ['did you mean "two_phase"?']),
        ("mode", "OverL-H", ['did you mean "overlap"?']),
        ("mode", "overlapping", ['did you mean "overlap"?']),
        ("mode", None, ["None (NoneType)"]),
        ("mode", 3, ["3 (int)"]),
        ("mode", ["auto"], ["['auto'] (list)"]),
        *[(option, 0, [f'{option} must be "auto" or a positive int (given: 0)', f"{option}=1"]) for option in COUNTS],
        *[(option, -4, ["(given: -4)"]) for option in COUNTS],
        *[(option, True, ["True (bool)"]) for option in COUNTS],
        *[(option, None, ["None (NoneType)"]) for option in COUNTS],
        *[(option, "8", ["'8' (str)", f"drop the quotes: {option}=8"]) for option in COUNTS],
        ("rows", "atuo", ['did you mean "auto"?']),
        ("rows", "many", ["'many' (str)"]),
        ("rows", 8.0, ["8.0 (float)", "write rows=8"]),
        ("rows", 8.5, ["8.5 (float)"]),
        ("rows", [4, 8], ["[4, 8] (list)"]),
        ("memory_budget", 0, ["(given: 0)", "use None"]),
        ("memory_budget", -1, ["(given: -1)"]),
        ("memory_budget", True, ["True (bool)"]),
        ("memory_budget", 1e9, ["float", "write memory_budget=1000000000"]),
        ("memory_budget", "6 gigs", ["memory_budget must be", "unknown unit of size 'gigs'", '"6GiB"']),
        ("memory_budget", "6 bananas", ["memory_budget must be", "unknown unit of size 'bananas'", "allowed: B, KB"]),
        ("memory_budget", "atuo", ['did you mean "auto"?']),
        ("memory_budget", ["6GiB"], ["(list)"]),
        ("max_overhead", -0.1, ["max_overhead must be a number of at least 0", "-0.1", "use 0"]),
        ("max_overhead", math.nan, ["nan"]),
        ("max_overhead", "0.5", ["'0.5' (str)", "drop the quotes: max_overhead=0.5"]),
        ("max_overhead", "35%", ["'35%' (str)", "write max_overhead=0.35"]),
        ("max_overhead", "much", ["'much' (str)", "write for example max_overhead=0.35"]),
        ("max_overhead", True, ["True (bool)"]),
        ("max_overhead", None, ["None (NoneType)"]),
        ("axis", 0, ["the batch axis", "batch_chunks"]),
        ("axis", "2", ["drop the quotes: axis=2"]),
        ("axis", "height", ["'height' (str)"]),
        ("axis", False, ["False (bool)"]),
        ("axis", 2.0, ["write axis=2"]),
        ("axis", None, ["None (NoneType)"]),
        ("modules", [], ["an empty sequence", '"auto"']),
        ("modules", "", ["an empty name", "named_modules()"]),
        ("modules", ["backbone", " "], ["an empty name"]),
        ("modules", ["auto", "head"], ['"auto" stands alone']),
        ("modules", ["head", "head"], ["'head' twice"]),
        ("modules", ["head", 3], ["3 (int) is not a name"]),
        ("modules", None, ["None (NoneType)"]),
        ("modules", 3, ["3 (int)"]),
        ("modules", {"backbone": True}, ["(dict)"]),
        ("modules", b"backbone", ["(bytes)"]),
        ("on_unsupported", "warning", ['one of "error", "warn"', 'did you mean "warn"?']),
        ("on_unsupported", False, ["False (bool)"]),
    ],
)
def test_refusals_say_what_was_given_what_is_allowed_and_what_to_do(
    option: str, value: object, words: list[str]
) -> None:
    message = refusal(**{option: value})
    assert message.startswith(f"{option} must be ")
    for word in words:
        assert word in message


def test_a_refused_size_has_its_examples_once() -> None:
    for text in ("6 bananas", "bananas", "6G"):
        assert refusal(memory_budget=text).count('"6GiB"') == 1


def test_an_overhead_that_looks_like_a_percentage_is_warned_of() -> None:
    with pytest.warns(UserWarning, match=r"max_overhead=35 allows 3500 % .* write max_overhead=0\.35 for 35 %, or inf"):
        assert RowConfig(max_overhead=35).max_overhead == 35
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert RowConfig(max_overhead=math.inf).max_overhead == math.inf
        assert RowConfig(max_overhead=9).max_overhead == 9


@pytest.mark.parametrize(("number", "text"), [(0, "0 rows"), (1, "1 row"), (2, "2 rows")])
def test_a_number_of_things(number: int, text: str) -> None:
    assert format_count(number, "row") == text


def test_a_refusal_is_a_value_error_and_of_the_package() -> None:
    with pytest.raises(ValueError, match="rows"):
        RowConfig(rows=0)
    assert issubclass(ConfigError, RowwiseError)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"row": 4}, ["unknown option 'row' (allowed: mode, rows, segments,", 'did you mean "rows"?']),
        ({"memory": 4}, ["unknown option 'memory'", 'did you mean "memory_budget"?']),
        ({"Max-Overhead": 4}, ['did you mean "max_overhead"?']),
        ({"zzz": 1, "rows": 4, "yyy": 2}, ["unknown options 'zzz', 'yyy'"]),
    ],
)
def test_unknown_options(options: dict[str, Any], words: list[str]) -> None:
    message = refusal(**options)
    for word in words:
        assert word in message
    assert ("did you mean" in message) == any("did you mean" in word for word in words)


# Modules


@pytest.mark.parametrize(
    ("given", "kept", "names"),
    [
        ("auto", "auto", None),
        ("backbone", ("backbone",), ("backbone",)),
        (["backbone", "head.convs"], ("backbone", "head.convs"), ("backbone", "head.convs")),
        (("backbone",), ("backbone",), ("backbone",)),
        (ListLike("a", "b"), ("a", "b"), ("a", "b")),
    ],
)
def test_modules_become_a_tuple(given: Any, kept: object, names: object) -> None:
    config = RowConfig(modules=given)
    assert config.modules == kept
    assert config.module_names == names


def test_modules_accept_the_list_of_a_hydra_configuration() -> None:
    omegaconf = pytest.importorskip("omegaconf")
    given = omegaconf.OmegaConf.create({"modules": ["backbone", "head"]})
    assert RowConfig(modules=given.modules).modules == ("backbone", "head")
    assert RowConfig.from_options(**given).modules == ("backbone", "head")


def test_command_line_parser_reads_every_field() -> None:
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(RowConfig, "strategy")
    arguments = [
        "--strategy.mode=two_phase",
        "--strategy.rows=8",
        "--strategy.segments=auto",
        "--strategy.memory_budget=6GiB",
        "--strategy.max_overhead=0.5",
        "--strategy.axis=2",
        '--strategy.modules=["backbone"]',
    ]
    parsed = parser.parse_args(arguments).strategy
    assert RowConfig(**vars(parsed)) == RowConfig(
        mode="two_phase", rows=8, memory_budget="6GiB", max_overhead=0.5, axis=2, modules=["backbone"]
    )
    with pytest.raises(jsonargparse.ArgumentError):
        parser.parse_args(["--strategy.rows=abc"])


def test_overhead_is_a_float() -> None:
    assert isinstance(RowConfig(max_overhead=1).max_overhead, float)


# Sizes

SIZES = [
    ("6GiB", 6 * 2**30),
    ("1.5GiB", 3 * 2**29),
    ("800MiB", 800 * 2**20),
    ("512 MB", 512 * 10**6),
    (" 2 kib ", 2048),
    ("2KB", 2000),
    ("1tb", 10**12),
    ("1TiB", 2**40),
    ("1PB", 10**15),
    ("1 PiB", 2**50),
    ("1e9", 10**9),
    ("1.5E3 MB", 1500 * 10**6),
    ("123B", 123),
    ("123", 123),
    ("0.1GB", 10**8),
    ("1.7B", 1),
    ("1.GiB", 2**30),
]


@pytest.mark.parametrize(("text", "size"), SIZES)
def test_parse_size(text: str, size: int) -> None:
    assert parse_size(text) == size
    assert RowConfig(memory_budget=text).budget_bytes == size


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "not a size"),
        ("GiB", "not a size"),
        ("-1GiB", "not a size"),
        ("1,5GiB", "not a size"),
        ("1.5.2GiB", "not a size"),
        (".5GiB", "not a size"),
        ("nan", "not a size"),
        ("inf", "not a size"),
        ("1e999", "not a size"),
        ("٣GiB", "not a size"),
        ("6 GiB free", "not a size"),
        ("6G", "write GiB (1024) or GB (1000)"),
        ("6gb/s", "not a size"),
        ("6 bytes", "unknown unit of size 'bytes'"),
        ("6EiB", "unknown unit of size 'EiB'"),
        ("0", "at least one byte"),
        ("0.4B", "at least one byte"),
        ("1e-9 KB", "at least one byte"),
        (6, "6 (int)"),
        (None, "None (NoneType)"),
    ],
)
def test_parse_size_refuses_with_examples(text: Any, word: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_size(text)
    assert word in str(caught.value)
    assert '"6GiB"' in str(caught.value)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1, "1 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (1536, "1.50 KiB"),
        (2**20 - 1, "1.00 MiB"),
        (3 * 2**29, "1.50 GiB"),
        (2**40, "1.00 TiB"),
        (5 * 2**50, "5.00 PiB"),
        (5000 * 2**50, "5000.00 PiB"),
        (-3 * 2**29, "-1.50 GiB"),
    ],
)
def test_format_size(size: int, text: str) -> None:
    assert format_size(size) == text


@pytest.mark.parametrize("size", [1, 2048, 3 * 2**29, 2**40])
def test_sizes_written_are_read_back(size: int) -> None:
    assert parse_size(format_size(size)) == size


@pytest.mark.parametrize(("budget", "expected"), [(None, None), ("auto", "auto"), (1000, 1000), ("1KiB", 1024)])
def test_budget_bytes(budget: Any, expected: object) -> None:
    assert RowConfig(memory_budget=budget).budget_bytes == expected


@pytest.mark.parametrize(("given", "end"), [("rwos", '; did you mean "rows"?'), ("qqq", ""), (7, ""), (None, "")])
def test_did_you_mean(given: object, end: str) -> None:
    assert did_you_mean(given, ["rows", "mode"]) == end


@pytest.mark.parametrize("given", ["35%", "much", "%", "0.5"])
def test_the_advice_for_a_fraction_is_itself_allowed(given: str) -> None:
    with pytest.raises(ConfigError) as caught:
        RowConfig(max_overhead=given)  # type: ignore[arg-type]
    value = str(caught.value).rpartition("max_overhead=")[2]
    assert RowConfig(max_overhead=float(value)).max_overhead == float(value)
