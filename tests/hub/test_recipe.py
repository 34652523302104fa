"""Recipes as text: what they mean, and mistakes: each is one line that names its place."""

import pytest
from recipe_cases import TOWER, llama_config, llama_shapes, tensors_of, write_llamas, write_model

from cqd_jax.cli.main import main
from cqd_jax.hub.recipe import parse_recipe
from cqd_jax.hub.recipe_values import Choice, ModelReference, RecipeError, settled

TWO = "models: [{model: one}, {model: two}]"
LINEAR = "merge_method: linear\nparameters: {weight: 1}\n"
TIES = "merge_method: ties\nbase_model: base\n"
STACK = "merge_method: passthrough\nslices: "
KNOWN = "models, slices, modules, merge_method"


def test_a_recipe_of_many_kinds():
  (recipe,) = parse_recipe(
    """
merge_method: dare_ties
base_model: {model: {path: base}, lora: adapter}
models:
  - model: one+other
    parameters: {weight: 1, density: [{filter: mlp, value: [0, 1]}, 0.5]}
parameters: {int8_mask: true, lambda: 2}
dtype: torch.bfloat16
""".replace("0.5]", "{filter: '*', value: 0.5}]")
  )
  assert recipe.base == ModelReference("base", "adapter")
  assert recipe.models == (recipe.base, ModelReference("one", "other"))
  assert str(recipe.models[1]) == "one+other"
  (part,) = recipe.modules[0].slices
  assert part.sources[0].settings["density"] == (Choice("mlp", (0.0, 1.0)), Choice("", 0.5))
  assert part.sources[1].model == recipe.base  # which the recipe did not list
  assert (recipe.dtype, recipe.out_dtype) == ("bfloat16", "")
  assert recipe.remarks == ("parameters.int8_mask: has no effect, since masks take no memory of their own here",)


def test_documents_come_after_those_they_need():
  last, middle, first = (
    "merge_method: linear\nparameters: {weight: 1}\nmodels: [{model: b}]\n",
    "name: b\nmerge_method: linear\nparameters: {weight: 1}\nmodels: [{model: a}, {model: one}]\n",
    "name: a\nmerge_method: linear\nparameters: {weight: 1}\nmodels: [{model: one}]\n",
  )
  assert [recipe.name for recipe in parse_recipe("---\n".join((last, middle, first)))] == ["a", "b", ""]


@pytest.mark.parametrize(
  ("value", "depth", "expected"),
  [
    ((0.0, 1.0), 0.25, 0.25),
    ((0.0, 0.5, 0.3, 0.7, 1.0), 0.5, 0.3),
    ((0.0, 0.5, 0.3, 0.7, 1.0), 0.375, 0.4),
    ((0.0, 0.5, 0.3, 0.7, 1.0), 1.0, 1.0),
    ((3.0,), 0.7, 3.0),
    ((True, False), 0.99, True),
    ((True, False), 1.0, False),
    (0.5, 0.9, 0.5),
  ],
)
def test_gradients(value, depth, expected):
  assert settled("weight", [{"weight": (Choice("", value),)}], "any", depth) == pytest.approx(expected)


def test_a_level_without_a_fitting_filter_leaves_it_to_the_next():
  levels = [{"t": (Choice("mlp", 1.0), Choice("attn", 2.0))}, {}, {"t": (Choice("norm", 3.0),)}]
  assert [settled("t", levels, name, 0.0) for name in ("x.mlp", "attn.mlp", "x.norm", "y")] == [1.0, 1.0, 3.0, None]


BAD = {
  "nothing": ("", "expected a recipe, got nothing"),
  "a list": ("[1]", "expected settings by name, got [1]"),
  "no yaml": ("a: [", "not YAML: expected the node content, but found '<stream end>' in line 1, column 5"),
  "a key twice": ("dtype: float32\ndtype: float32", "not YAML: 'dtype' is given twice in line 2, column 1"),
  "a key that is a number": ("1: 2", "expected names, got 1"),
  "no method": (TWO, "merge_method: missing"),
  "a method with a slip": ("merge_method: tie\n" + TWO, "merge_method: unknown method 'tie'; did you mean ties?"),
  "a method of nobody": ("merge_method: zzz\n" + TWO, "merge_method: unknown method 'zzz'; all: linear, "),
  "a method that is a list": ("merge_method: [ties]\n" + TWO, "merge_method: expected text, got ['ties']"),
  "a key with a slip": (LINEAR + TWO + "\nbasemodel: x", "unknown key 'basemodel'; did you mean base_model?"),
  "a key of nobody": (LINEAR + TWO + "\nzzz: x", f"unknown key 'zzz'; known: {KNOWN}"),
  "no models": (LINEAR, "expected exactly one of models, slices and modules, got none"),
  "models and slices": (
    LINEAR + TWO + "\nslices: []",
    "expected exactly one of models, slices and modules, got models and slices",
  ),
  "models are a mapping": (
    LINEAR + "models: {model: one}",
    "models: expected a list of at least one, got {'model': 'one'}",
  ),
  "models are none": (LINEAR + "models: []", "models: expected a list of at least one, got []"),
  "a model is text": (LINEAR + "models: [one]", "models[0]: expected settings by name, got 'one'"),
  "a model without model": (LINEAR + "models: [{parameters: {}}]", "models[0]: misses model"),
  "a model with a slip": (LINEAR + "models: [{modle: one}]", "models[0]: unknown key 'modle'; did you mean model?"),
  "a model with layers": (
    LINEAR + "models: [{model: one, layer_range: [0, 1]}]",
    "models[0]: unknown key 'layer_range'",
  ),
  "a model is a number": (LINEAR + "models: [{model: 3}]", "models[0].model: expected settings by name, got 3"),
  "a model is empty": (LINEAR + "models: [{model: ''}]", "models[0].model: expected text, got ''"),
  "a model twice": (LINEAR + "models: [{model: one}, {model: one}]", "models: one is given twice"),
  "a revision": (LINEAR + "models: [{model: one@main}]", "models[0].model: a revision ('one@main') is not supported"),
  "a revision by name": (
    LINEAR + "models: [{model: {model: {path: one, revision: main}}}]",
    "models[0].model.model.revision: is not supported",
  ),
  "another architecture": (
    LINEAR + "models: [{model: {model: one, override_architecture: X}}]",
    "models[0].model.override_architecture: is not supported",
  ),
  "two adapters": (LINEAR + "models: [{model: one+a+b}]", "models[0].model: expected at most one + before an adapter"),
  "an adapter without a name": (LINEAR + "models: [{model: one+}]", "models[0].model: expected text, got ''"),
  "no base": ("merge_method: ties\n" + TWO, "base_model: missing; ties needs it"),
  "a base for slerp": ("merge_method: slerp\nparameters: {t: 0.5}\n" + TWO, "base_model: missing; slerp needs it"),
  "no weight": ("merge_method: linear\n" + TWO, "models[0].parameters.weight: missing; linear needs it"),
  "no weight of one": (
    TIES + "models: [{model: one, parameters: {weight: 1}}, {model: two}]",
    "models[1].parameters.weight: missing; ties needs it",
  ),
  "no weight of the base": (
    "merge_method: linear\nbase_model: base\nmodels: [{model: one, parameters: {weight: 1}}]",
    "base_model: weight: missing; linear needs it of each model; list the base among the models, or leave it out",
  ),
  "no t": ("merge_method: slerp\nbase_model: one\n" + TWO, "parameters.t: missing; slerp needs it"),
  "slerp of three": (
    "merge_method: slerp\nbase_model: base\nparameters: {t: 0.5}\n" + TWO,
    "models: slerp takes 1 model beside the base model, got 2",
  ),
  "passthrough of two": ("merge_method: passthrough\n" + TWO, "models: passthrough takes 1 model, got 2"),
  "passthrough with a base": (
    "merge_method: passthrough\nbase_model: base\nmodels: [{model: one}]",
    "models: passthrough takes 1 model, got 2 (base_model is one of them)",
  ),
  "a setting with a slip": (
    LINEAR + TWO.replace("one", "one, parameters: {wieght: 1}"),
    "models[0].parameters: unknown setting 'wieght' of linear; did you mean weight?",
  ),
  "a setting of another method": (
    "merge_method: linear\nparameters: {weight: 1, density: 1}\n" + TWO,
    "parameters: unknown setting 'density' of linear; known: weight, normalize",
  ),
  "a setting of all at one": (
    LINEAR + TWO.replace("one", "one, parameters: {normalize: true}"),
    "models[0].parameters.normalize: is one for all models",
  ),
  "settings are a list": (LINEAR.replace("{weight: 1}", "[1]") + TWO, "parameters: expected settings by name, got [1]"),
  "a weight is text": (
    "merge_method: linear\nparameters: {weight: heavy}\n" + TWO,
    "parameters.weight: expected a number, got 'heavy'",
  ),
  "a weight is nothing": (
    "merge_method: linear\nparameters: {weight: }\n" + TWO,
    "parameters.weight: expected a number, got None",
  ),
  "a weight is a bool": (
    "merge_method: linear\nparameters: {weight: true}\n" + TWO,
    "parameters.weight: expected a number, got True",
  ),
  "a weight is infinite": (
    "merge_method: linear\nparameters: {weight: .inf}\n" + TWO,
    "parameters.weight: expected a number, got inf",
  ),
  "a density above 1": (
    TIES + "parameters: {weight: 1, density: 1.5}\n" + TWO,
    "parameters.density: expected a number in [0, 1], got 1.5",
  ),
  "a switch is text": (
    TIES + "parameters: {weight: 1, normalize: 'yes'}\n" + TWO,
    "parameters.normalize: expected true or false, got 'yes'",
  ),
  "an empty gradient": (
    "merge_method: linear\nparameters: {weight: []}\n" + TWO,
    "parameters.weight: expected a gradient of at least one value, got none",
  ),
  "a gradient of text": (
    "merge_method: linear\nparameters: {weight: [1, x]}\n" + TWO,
    "parameters.weight[1]: expected a number, got 'x'",
  ),
  "a filter without a value": (
    "merge_method: linear\nparameters: {weight: [{filter: mlp}]}\n" + TWO,
    "parameters.weight[0]: misses value",
  ),
  "a filter with a slip": (
    "merge_method: linear\nparameters: {weight: [{fliter: mlp, value: 1}]}\n" + TWO,
    "parameters.weight[0]: unknown key 'fliter'; did you mean filter?",
  ),
  "a filter is a number": (
    "merge_method: linear\nparameters: {weight: {filter: 3, value: 1}}\n" + TWO,
    "parameters.weight.filter: expected text, got 3",
  ),
  "numbers among filters": (
    "merge_method: linear\nparameters: {weight: [{filter: mlp, value: 1}, 2]}\n" + TWO,
    "parameters.weight[1]: expected settings by name, got 2",
  ),
  "an integer with a part": (
    "merge_method: karcher\nparameters: {max_iter: 2.5}\n" + TWO,
    "parameters.max_iter: expected an integer, got 2.5",
  ),
  "nuslerp of one": (
    "merge_method: nuslerp\nparameters: {weight: 1}\nmodels: [{model: one}]",
    "models: nuslerp takes 2 models, got 1",
  ),
  "model_stock of one": (
    "merge_method: model_stock\nbase_model: base\nmodels: [{model: one}]",
    "models: model_stock takes at least 2 models beside the base model, got 1",
  ),
  "slices are none": (STACK + "[]", "slices: expected a list of at least one, got []"),
  "a slice without sources": (STACK + "[{}]", "slices[0]: misses sources"),
  "a slice with a slip": (STACK + "[{source: []}]", "slices[0]: unknown key 'source'; did you mean sources?"),
  "a slice without layers": (
    STACK + "[{sources: [{model: one}]}]",
    "slices[0].sources[0].layer_range: expected two layers [first, one after the last], got None",
  ),
  "layers backwards": (
    STACK + "[{sources: [{model: one, layer_range: [2, 1]}]}]",
    "slices[0].sources[0].layer_range: expected two layers [first, one after the last], got [2, 1]",
  ),
  "slices of other lengths": (
    LINEAR + "slices: [{sources: [{model: one, layer_range: [0, 2]}, {model: two, layer_range: [0, 1]}]}]",
    "slices[0].sources: expected as many layers of each, got 2, 1",
  ),
  "a weight in a slice": (
    "merge_method: linear\nslices: [{sources: [{model: one, layer_range: [0, 2]}]}, {sources: [{model: one, "
    "layer_range: [0, 1], parameters: {weight: [x]}}]}]",
    "slices[1].sources[0].parameters.weight[0]: expected a number, got 'x'",
  ),
  "a slice without the base": (
    TIES + "parameters: {weight: 1}\nslices: [{sources: [{model: one, layer_range: [0, 2]}]}]",
    "slices[0]: expected the base model base once among the models, which it has not",
  ),
  "modules are none": (LINEAR + "modules: {}", "modules: expected at least one"),
  "a module of nothing": (
    LINEAR + "modules: {default: {}}",
    "modules.default: expected exactly one of models and slices, got none",
  ),
  "a dtype": (LINEAR + TWO + "\ndtype: int64", "dtype: expected one of float32, float16, bfloat16, got 'int64'"),
  "a dtype of the result": (
    LINEAR + TWO + "\nout_dtype: fp16",
    "out_dtype: expected one of float32, float16, bfloat16, got 'fp16'",
  ),
  "two tokenizers": (
    LINEAR + TWO + "\ntokenizer: {source: base}\ntokenizer_source: base",
    "expected at most one of tokenizer_source and tokenizer, got both",
  ),
  "tokens": (
    LINEAR + TWO + "\ntokenizer: {source: one, tokens: {a: {source: one}}}",
    "tokenizer.tokens: is not supported",
  ),
  "padding": (
    LINEAR + TWO + "\ntokenizer: {source: one, pad_to_multiple_of: 8}",
    "tokenizer.pad_to_multiple_of: is not supported",
  ),
  "the tokenizer of no base": (LINEAR + TWO + "\ntokenizer_source: base", "tokenizer_source: base needs a base_model"),
  "a built-in template": (
    LINEAR + TWO + "\nchat_template: chatml",
    "chat_template: the built-in template chatml is not supported",
  ),
  "a template": (
    LINEAR + TWO + "\nchat_template: hello",
    "chat_template: expected auto, or Jinja of at least 20 characters, got 'hello'",
  ),
  "documents of one name": (
    f"{LINEAR}{TWO}\nname: x\n---\n{LINEAR}{TWO}\nname: x",
    "name: two documents are called 'x'",
  ),
  "two results": (
    f"{LINEAR}{TWO}\n---\n{LINEAR}{TWO}",
    "expected one document that no other one uses, the result; got one without a name",
  ),
  "a circle": (
    f"name: x\n{LINEAR}models: [{{model: y}}]\n---\nname: y\n{LINEAR}models: [{{model: x}}]",
    "name: the documents 'x', 'y' need each other",
  ),
  "a mistake in a document": (f"{LINEAR}{TWO}\nname: x\n---\nzzz: 1", "document 2: unknown key 'zzz'"),
}


@pytest.mark.parametrize("mistake", BAD)
def test_a_mistake_is_one_line_with_its_place(mistake):
  text, expected = BAD[mistake]
  with pytest.raises(RecipeError) as error:
    parse_recipe(text)
  assert str(error.value).startswith(expected)
  assert "\n" not in str(error.value)
  assert len(str(error.value)) < 300


@pytest.fixture(scope="module")
def models(tmp_path_factory):
  """Models that fit, and such as do not."""
  root = tmp_path_factory.mktemp("models")
  write_llamas(root, ("base", "one", "two"))
  write_model(root / "wide", tensors_of(llama_shapes() | {"model.embed_tokens.weight": (20, 8)}, 0), llama_config())
  write_model(root / "deep", tensors_of(llama_shapes(4), 0), llama_config(4))
  write_model(root / "uncounted", tensors_of(llama_shapes(), 0), {"model_type": "llama"})
  write_model(root / "seeing", tensors_of(llama_shapes() | TOWER, 0), llama_config())
  other = {"tokenizer.json": {"model": {"vocab": {"b": 0, "a": 1, "c": 2}}}}
  write_model(root / "strange", tensors_of(llama_shapes(), 0), llama_config(), other)
  (root / "adapter").mkdir()
  (root / "adapter" / "adapter_config.json").write_text("{}")
  (root / "empty").mkdir()
  (root / "pickled").mkdir()
  (root / "pickled" / "pytorch_model.bin").write_text("")
  return root


def stack(*ranges, model="one"):
  return STACK + f"[{', '.join(f'{{sources: [{{model: {model}, layer_range: {list(one)}}}]}}' for one in ranges)}]"


UNFIT = {
  "no folder": (LINEAR + "models: [{model: nowhere}]", "nowhere: no such folder; expected one that holds a model"),
  "no adapter": (LINEAR + "models: [{model: one+nowhere}]", "nowhere: no such folder"),
  "no weights": (LINEAR + "models: [{model: empty}]", "empty: has no model.safetensors"),
  "pickles": (LINEAR + "models: [{model: pickled}]", "pickled: its weights are pickle files"),
  "another shape": (
    LINEAR + "models: [{model: one}, {model: wide}]",
    "embed_tokens.weight: expected one shape, got (16, 8) in one and (20, 8) in wide; of vocabularies that differ",
  ),
  "more layers": (
    LINEAR + "models: [{model: one}, {model: deep}]",
    ": one misses it, deep has it",
  ),
  "layers beyond": (stack((0, 5)), "slices[0].sources[0].layer_range: one has 3 layers, got [0, 5]"),
  "two stacks": (
    stack((0, 1), model="seeing"),
    "slices: slices need one stack of layers, got model.layers., vision_tower.",
  ),
  "a module of no tensors": (
    LINEAR + "modules: {head: {models: [{model: one}]}, default: {models: [{model: one}]}}",
    "modules.head: no tensor's name begins with 'head'",
  ),
  "tensors of no module": (
    LINEAR + "modules: {vision_tower: {models: [{model: seeing}]}}",
    "modules: none has the tensor 'lm_head.weight' (13 such)",
  ),
  "a filter that leaves some out": (
    "merge_method: linear\nparameters: {weight: {filter: mlp, value: 1}}\nmodels: [{model: one}]",
    "models[0].parameters.weight: has no value for 'lm_head.weight'",
  ),
  "a count that nobody says": (stack((0, 1), model="uncounted"), "slices: 0 entries of config.json"),
  "no tokenizer": (
    LINEAR + "models: [{model: one}]\ntokenizer_source: one",
    "tokenizer_source: one holds no tokenizer files",
  ),
  "another vocabulary": (
    LINEAR + "models: [{model: base}]\ntokenizer_source: strange",
    "tokenizer_source: 'c' of strange is in none of the models",
  ),
  "a union of vocabularies that were learned": (
    LINEAR + "models: [{model: base}, {model: strange}]\ntokenizer_source: union",
    "tokenizer_source: union: 'c' is in the vocabulary of strange and not in that of base",
  ),
  "an adapter alone": (LINEAR + "models: [{model: adapter}]", "adapter: is a LoRA adapter; expected BASE+adapter"),
  "no template": (
    LINEAR + "models: [{model: one}]\nchat_template: auto",
    "chat_template: auto, and none of the models has",
  ),
  "a window beyond 0": (
    "merge_method: della\nbase_model: base\nparameters: {weight: 1, density: 0.1}\n" + TWO,
    "models: of lm_head.weight: epsilon: expected all probabilities in (0, 1], got -0.05 to 0.25",
  ),
  "weights that cancel": (
    "merge_method: linear\nmodels: [{model: one, parameters: {weight: 1}}, {model: two, parameters: {weight: -1}}]",
    "has NaN or infinite values",
  ),
}


@pytest.mark.parametrize("mistake", UNFIT)
def test_models_that_do_not_fit_end_the_command(mistake, models, tmp_path, monkeypatch, capsys):
  text, expected = UNFIT[mistake]
  monkeypatch.chdir(models)
  (tmp_path / "recipe.yml").write_text(text)
  assert main(["merge", str(tmp_path / "recipe.yml"), str(tmp_path / "merged")]) == 2
  said = capsys.readouterr().err
  assert said.startswith("cqd: ")
  assert said.count("\n") == 1
  assert expected in said
  assert [path.name for path in tmp_path.iterdir()] == ["recipe.yml"]


def test_the_command(models, tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(models)
  recipe, out = tmp_path / "recipe.yml", tmp_path / "merged"
  command = ["merge", str(recipe), str(out)]
  assert main(command) == 2
  assert capsys.readouterr().err == f"cqd: {recipe}: no such file; expected a recipe in mergekit's YAML\n"
  recipe.write_text(TIES + "parameters: {weight: 1, int8_mask: true}\n" + TWO)
  assert main([*command, "--dry-run"]) == 0
  assert capsys.readouterr().out == (
    "note: parameters.int8_mask: has no effect, since masks take no memory of their own here\n"
    "ties: 12 tensors, 0.0 MB in 1 file; nothing was written\n"
  )
  assert not out.exists()
  assert main(command) == 0
  assert "12 tensors" in capsys.readouterr().out
  assert (out / "model.safetensors").is_file()
  assert main(command) == 2
  assert capsys.readouterr().err == f"cqd: {out}: already exists; nothing was overwritten\n"
  assert main([*command[:2], str(tmp_path / "x"), "--shard-mb", "0"]) == 2
  assert main([*command[:2], str(tmp_path / "x"), "--seed", "-1"]) == 2
  (tmp_path / "no text").write_bytes(b"\xff\xfe\xfa")
  assert main(["merge", str(tmp_path / "no text"), str(tmp_path / "x")]) == 2
  with pytest.raises(SystemExit, match="0"):
    main(["merge", "--help"])
  assert "slerp" in capsys.readouterr().out
