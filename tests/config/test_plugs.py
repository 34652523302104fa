"""Plugs: names become functions, settings are checked against signatures, mistakes are told by name and with a hint."""

import functools
import re
import sys
import textwrap
import types
from typing import Literal

import pytest
from jax.typing import ArrayLike

from cqd_jax.config.plugs import KINDS, Plug, PlugError, find, in_words, listing, resolve, settings_of
from cqd_jax.genotypes.space import core, dense
from cqd_jax.operators.crossover import linear_crossover
from cqd_jax.operators.mutation import expert_svd_mutation, no_mutation, svd_mutation
from cqd_jax.search.methods import cma_es, cycleqd, task_arithmetic
from cqd_jax.search.methods import emitter as emitter_method

SHORT_NAMES = [(kind, name) for kind, own in KINDS.items() for name in own.table]


class Unknown:
  """Nothing that pydantic knows."""


def numbers(
  key,
  *,
  count: int = 3,
  scale: float = 1.0,
  flag: bool = False,
  size: ArrayLike = 1.0,
  sizes: tuple[float, ...] = (),
  pairs: tuple[tuple[int, int], ...] = (),
  either: int | tuple[int, ...] = 1,
  word: Literal["a", "b"] = "a",
  thing: Unknown | None = None,
  anything=None,
):
  """Takes numbers.

  Args:
    key: not a setting.
    count: how many,
      counted from 1: at least
      one.
    scale: of each.

  Raises:
    ValueError: never.
  """


def needs(*, first, second: int):
  """Needs both."""


def unresolvable(*, count: "Nowhere" = 3):
  """Its annotation has no meaning at run time."""


class Maker:
  """Functions in a class."""

  @staticmethod
  def make(*, size: int = 1):
    """Makes."""


@pytest.fixture(autouse=True)
def module(monkeypatch):
  """A module of the user's."""
  own = types.ModuleType("own_plugs")
  own.numbers, own.needs, own.unresolvable, own.Maker, own.constant = numbers, needs, unresolvable, Maker, 3
  monkeypatch.setitem(sys.modules, "own_plugs", own)


def own(name="numbers", **settings):
  return resolve("mutation", Plug(f"own_plugs:{name}", settings), "here")


@pytest.mark.parametrize(
  ("given", "expected", "dumped"),
  [
    ("svd", Plug("svd"), "svd"),
    ({"use": "svd"}, Plug("svd"), "svd"),
    ({"use": "svd", "max_scale": 2}, Plug("svd", {"max_scale": 2}), {"use": "svd", "max_scale": 2}),
    (
      {"use": "cycleqd", "mutation": Plug("svd", {"max_scale": 2}), "sizes": (1, (2, 3))},
      Plug("cycleqd", {"mutation": Plug("svd", {"max_scale": 2}), "sizes": (1, (2, 3))}),
      {"use": "cycleqd", "mutation": {"use": "svd", "max_scale": 2}, "sizes": [1, [2, 3]]},
    ),
  ],
)
def test_a_plug_is_read_from_a_name_or_a_mapping_and_written_back(given, expected, dumped):
  assert Plug.parse(given) == expected
  assert Plug.parse(expected) is expected
  assert expected.dump() == dumped
  assert Plug.parse(dumped).dump() == dumped


@pytest.mark.parametrize(
  ("given", "message"),
  [
    (3, r"expected a name, or \{use: NAME, ...\}, got 3"),
    (None, "expected a name, or .* got None"),
    ({"max_scale": 2}, "expected a name, or .* got .'max_scale': 2"),
    ({"use": 3}, "expected a name, or .* got .'use': 3"),
    ({"use": "svd", 3: 4}, "expected names of settings, got 3"),
  ],
)
def test_what_is_no_plug_is_refused(given, message):
  with pytest.raises(ValueError, match=message):
    Plug.parse(given)


def test_a_plug_takes_further_settings_and_can_be_said():
  plug = Plug("svd", {"max_scale": 2})
  assert plug.with_settings(max_scale=3, rank=1) == Plug("svd", {"max_scale": 3, "rank": 1})
  assert plug == Plug("svd", {"max_scale": 2})
  assert (str(Plug("none")), str(plug.with_settings(rank=1))) == ("none", "svd (max_scale 2, rank 1)")


def test_a_short_name_is_a_function_and_settings_are_bound():
  assert resolve("mutation", Plug("none"), "here") is no_mutation
  bound = resolve("mutation", Plug("svd", {"max_scale": 2}), "here")
  assert (bound.func, bound.keywords) == (svd_mutation, {"max_scale": 2.0})


def test_anybodys_function_is_named_by_its_module():
  assert own() is numbers
  assert own("Maker.make", size=3).keywords == {"size": 3}
  assert resolve("mutation", Plug("cqd_jax.operators.mutation:no_mutation"), "here") is no_mutation


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("svg", "here: no mutation 'svg'; there are none, gaussian, svd, expert_svd, or package.module:function; did you "),
    ("zzz", "here: no mutation 'zzz'; there are none, gaussian, svd, expert_svd, or package.module:function$"),
    (":x", "no mutation ':x'"),
    ("x:", "no mutation 'x:'"),
    ("x y:z", "no mutation 'x y:z'"),
    ("no_such_module:f", "here: 'no_such_module:f' cannot be imported"),
    ("own_plugs:f", "here: own_plugs has no 'f'"),
    ("own_plugs:Maker.f", "here: own_plugs has no 'Maker.f'"),
    ("own_plugs:constant", "here: 'own_plugs:constant' is no function, but int"),
  ],
)
def test_a_name_that_is_none_is_told(name, message):
  with pytest.raises(PlugError, match=message):
    resolve("mutation", Plug(name), "here")


def test_a_kind_without_short_names_says_so():
  with pytest.raises(PlugError, match=r"no emitter 'mixing'; there are none, or package\.module:function"):
    find("emitter", "mixing", "here")


@pytest.mark.parametrize(
  ("source", "message"),
  [
    ("def f(:", "'broken_plugs:f' cannot be imported .SyntaxError"),
    ("1 / 0", "'broken_plugs:f' cannot be imported .ZeroDivisionError"),
    ("import sys; sys.nothing", "'broken_plugs:f' cannot be imported .AttributeError: .*nothing"),
    ("import no_such_module", "'broken_plugs:f' cannot be imported .No module named 'no_such_module'"),
  ],
)
def test_a_module_that_cannot_be_imported_is_told(tmp_path, monkeypatch, source, message):
  (tmp_path / "broken_plugs.py").write_text(source)
  monkeypatch.syspath_prepend(tmp_path)
  with pytest.raises(PlugError, match=message):
    resolve("mutation", Plug("broken_plugs:f"), "here")


def test_settings_are_the_keyword_only_parameters():
  settings = settings_of("mutation", numbers)
  assert list(settings) == [
    "count", "scale", "flag", "size", "sizes", "pairs", "either", "word", "thing", "anything",
  ]  # fmt: skip
  assert settings["count"].text == "how many, counted from 1: at least one."
  assert settings["scale"].text == "of each."
  assert settings["word"].text == ""
  assert (settings["count"].default, settings["count"].required) == (3, False)
  assert settings_of("mutation", needs)["first"].required
  assert list(settings_of("tasks", lambda *, sizes, seed, size=1: None)) == ["size"]  # the others are given
  assert list(settings_of("engine", lambda interface, *, mesh, size=1: None)) == ["size"]


@pytest.mark.parametrize(
  ("name", "value", "expected"),
  [
    ("count", 4, 4),
    ("scale", 2, 2.0),
    ("scale", 2.5, 2.5),
    ("flag", True, True),
    ("size", 2, 2.0),  # what may be traced is a number in a configuration
    ("sizes", [1, 2.5], (1.0, 2.5)),
    ("sizes", (1, 2.5), (1.0, 2.5)),
    ("pairs", [[1, 2], [3, 4]], ((1, 2), (3, 4))),
    ("either", 3, 3),
    ("either", [3, 4], (3, 4)),
    ("word", "b", "b"),
    ("thing", "whatever", "whatever"),  # of a type that only the function knows
    ("anything", {"a": 1}, {"a": 1}),
  ],
)
def test_settings_of_the_right_type_are_bound(name, value, expected):
  bound = own(**{name: value}).keywords[name]
  assert bound == expected
  assert type(bound) is type(expected)


@pytest.mark.parametrize(
  ("name", "value", "message"),
  [
    ("count", "4", r"here\.count: .*integer, got '4'"),
    ("count", 4.0, r"here\.count: .*integer, got 4\.0"),
    ("count", True, r"here\.count: .*integer, got True"),
    ("count", None, r"here\.count: .*integer, got None"),
    ("scale", "big", r"here\.scale: .*number, got 'big'"),
    ("scale", True, r"here\.scale: .*number, got True"),
    ("flag", 1, r"here\.flag: .*boolean, got 1"),
    ("size", [1, 2], r"here\.size: .*number, got \[1, 2\]"),
    ("sizes", [1, "2"], r"here\.sizes: .*number, got \(1, '2'\)"),
    ("sizes", 1.0, r"here\.sizes: .*tuple, got 1\.0"),
    ("pairs", [[1, 2, 3]], r"here\.pairs: "),
    ("word", "c", r"here\.word: .*'a' or 'b', got 'c'"),
    ("scale", float("nan"), r"here\.scale: expected finite numbers, got nan"),
    ("scale", float("inf"), r"here\.scale: expected finite numbers, got inf"),
    ("size", float("-inf"), r"here\.size: expected finite numbers, got -inf"),
    ("sizes", [1.0, float("nan")], r"here\.sizes: expected finite numbers, got \(1\.0, nan\)"),
  ],
)
def test_settings_of_the_wrong_type_are_refused_by_name(name, value, message):
  with pytest.raises(PlugError, match=f"^{message}"):
    own(**{name: value})


def test_unknown_and_missing_settings_are_told_with_what_there_is():
  with pytest.raises(PlugError, match=r"^here: own_plugs:numbers has no setting 'scal'; did you mean 'scale'\?$"):
    own(scal=1)
  with pytest.raises(PlugError, match=r"^here: own_plugs:needs has no setting 'zzz'; it has first, second$"):
    own("needs", zzz=1)
  with pytest.raises(PlugError, match=r"^here: none has no setting 'zzz'; it has none$"):
    resolve("mutation", Plug("none", {"zzz": 1}), "here")
  with pytest.raises(PlugError, match=r"^here: own_plugs:needs needs the setting 'second'$"):
    own("needs", first=3)
  with pytest.raises(PlugError, match=r"^here: svd needs the setting 'max_scale'$"):
    resolve("mutation", Plug("svd"), "here")
  with pytest.raises(PlugError, match=r"has no setting 'key'; "):  # an argument, but not a setting
    own(key=1)
  with pytest.raises(PlugError, match=r"coding has no setting 'sizes'; "):  # the program's to give
    resolve("tasks", Plug("coding", {"sizes": {}}), "here")


def test_an_annotation_that_cannot_be_resolved_is_the_functions_own_affair():
  assert own("unresolvable", count="many").keywords == {"count": "many"}


def test_a_setting_with_the_name_of_a_kind_is_a_plug_itself():
  bound = resolve(
    "methods",
    Plug("cycleqd", {"mutation": {"use": "expert_svd", "rate": 0.2}, "genotype": "core", "batch_size": 2}),
    "methods[0]",
  )
  assert bound.func is cycleqd
  assert bound.keywords["batch_size"] == 2
  assert bound.keywords["genotype"] is core
  assert bound.keywords["mutation"].func is expert_svd_mutation
  assert bound.keywords["mutation"].keywords == {"rate": 0.2}


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"mutation": {"use": "svg"}}, r"^methods\[0\]\.mutation: no mutation 'svg'; .*did you mean 'svd'"),
    ({"mutation": {"use": "svd", "max_size": 2}}, r"^methods\[0\]\.mutation: svd has no setting 'max_size'"),
    ({"mutation": {"use": "svd", "max_scale": "2"}}, r"^methods\[0\]\.mutation\.max_scale: .*number, got '2'"),
    ({"mutation": 3}, r"^methods\[0\]\.mutation: expected a name, or"),
    ({"genotype": {"rank": 3}}, r"^methods\[0\]\.genotype: expected a name, or"),
    ({"crossover": {"use": "linear", "std": float("inf")}}, r"^methods\[0\]\.crossover\.std: expected finite"),
  ],
)
def test_a_mistake_in_a_plug_inside_a_plug_is_told_by_its_place(settings, message):
  with pytest.raises(PlugError, match=message):
    resolve("methods", Plug("cycleqd", settings), "methods[0]")


def test_defaults_are_said_in_words():
  assert in_words(3) == "3"
  assert in_words((0.1, 0.2)) == "(0.1, 0.2)"
  assert in_words(dense) == "dense"
  assert in_words(functools.partial(linear_crossover, std=0.03)) == "linear (std 0.03)"
  nested = functools.partial(functools.partial(core, rank=3), rank=4, share_base=True)
  assert in_words(nested) == "core (rank 4, share_base True)"
  assert in_words(functools.partial(cycleqd, genotype=nested)) == "cycleqd (genotype core (rank 4, share_base True))"
  assert in_words(settings_of("methods", cma_es)["genotype"].default) == "coefficients (granularity model)"
  assert in_words(textwrap.dedent) == "textwrap:dedent"
  assert in_words(_Callable()) == f"{__name__}:_Callable"


class _Callable:
  def __call__(self):
    pass


def test_the_listing_has_every_short_name():
  assert [(kind, name) for kind, name, _ in listing_of_those_there_are()] == SHORT_NAMES
  assert find("methods", "task_arithmetic", "here") is task_arithmetic
  assert settings_of("methods", emitter_method)["emitter"].required


def listing_of_those_there_are():
  return list(listing())


@pytest.mark.parametrize(("kind", "name"), SHORT_NAMES, ids=[f"{kind}-{name}" for kind, name in SHORT_NAMES])
def test_every_short_name_is_documented_with_all_its_settings(kind, name):
  function = find(kind, name, kind)
  assert re.match(r"\S.*[.:]", (function.__doc__ or "").strip()), "says what it does"
  for setting in settings_of(kind, function).values():
    assert re.match(r"\S.*\.$", setting.text), f"{setting.name}: said by the docstring, in a sentence"
    assert setting.annotation is not None


def test_a_setting_that_is_a_plug_is_found_among_the_kinds():
  """Else its functions could not be named in a configuration."""
  for kind, name, function in listing_of_those_there_are():
    for setting in settings_of(kind, function).values():
      takes_function = "Callable" in str(setting.annotation) or callable(setting.default)
      assert not (takes_function and not setting.required) or setting.name in KINDS, (name, setting.name)
