"""The vocabulary of the miniature skills as the files of a Hugging Face tokenizer, so that its models can be served."""

import json

from cqd_jax.tasks.skills.vocabulary import BEGIN, END, PAD, SEPARATOR, TOKENS


def tokenizer_files() -> dict[str, str]:
  """Contents by the names of the files.

  WordPiece without prefixes is greedy longest match, as `vocabulary.encode`. A text becomes BEGIN, text, SEPARATOR,
  with which a model is asked (`training.prompt_tokens`).
  """
  specials = [PAD, BEGIN, SEPARATOR, END]
  tokenizer = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [
      {
        "id": index,
        "content": TOKENS[index],
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
      }
      for index in specials
    ],
    "normalizer": None,
    "pre_tokenizer": None,
    "post_processor": {
      "type": "TemplateProcessing",
      "single": [_special(BEGIN), {"Sequence": {"id": "A", "type_id": 0}}, _special(SEPARATOR)],
      "pair": [_special(BEGIN), {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
      "special_tokens": {
        TOKENS[index]: {"id": TOKENS[index], "ids": [index], "tokens": [TOKENS[index]]} for index in (BEGIN, SEPARATOR)
      },
    },
    "decoder": {"type": "Fuse"},
    "model": {
      "type": "WordPiece",
      "unk_token": TOKENS[PAD],
      "continuing_subword_prefix": "",
      "max_input_chars_per_word": 1_000_000,
      "vocab": {token: index for index, token in enumerate(TOKENS)},
    },
  }
  config = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": TOKENS[BEGIN],
    "eos_token": TOKENS[END],
    "pad_token": TOKENS[PAD],
    "sep_token": TOKENS[SEPARATOR],
    "clean_up_tokenization_spaces": False,
    "padding_side": "left",
  }
  return {"tokenizer.json": json.dumps(tokenizer, ensure_ascii=False), "tokenizer_config.json": json.dumps(config)}


def _special(index: int) -> dict[str, dict[str, object]]:
  return {"SpecialToken": {"id": TOKENS[index], "type_id": 0}}
