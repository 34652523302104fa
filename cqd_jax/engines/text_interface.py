"""How dialogues become tokens and tokens answers: the tokenizer, the decoder's settings, and where an answer ends."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cqd_jax.hub.load import ModelFolder
from cqd_jax.hub.save import tokenizer_paths
from cqd_jax.models import DecoderConfig
from cqd_jax.tasks.episode import Message
from cqd_jax.tasks.skills.tokenizer import tokenizer_files
from cqd_jax.tasks.skills.training import MINIATURE, prompt_tokens
from cqd_jax.tasks.skills.vocabulary import BEGIN, END, PAD, SEPARATOR, decode, encode


@dataclasses.dataclass(frozen=True)
class TextInterface:
  """What all models of an experiment have in common.

  Attributes:
    config: the decoder.
    encode: a dialogue to the tokens with which a model is asked; raises ValueError where it cannot be written so.
    decode: the tokens of an answer to its text.
    end_ids: tokens of which each ends an answer.
    pad_id: token that fills rows.
    tokenizer: a folder with the tokenizer's files, or the files' contents by name.
    settings: of `config.json`, beside what describes the decoder.
    generation: of `generation_config.json`.
    encode_answer: `(dialogue, answer) -> tokens` with which a model is to answer it, the end included; None where none
      are learned.
    context: tokens that a dialogue and its next answer may have together; None: as many as there are.
  """

  config: DecoderConfig
  encode: Callable[[Sequence[Message]], list[int]]
  decode: Callable[[Iterable[int]], str]
  end_ids: tuple[int, ...]
  pad_id: int
  tokenizer: Path | Mapping[str, str]
  settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  generation: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  encode_answer: Callable[[Sequence[Message], str], list[int]] | None = None
  context: int | None = None

  @property
  def fingerprint(self) -> str:
    """Names what an answer depends on beside weights and question."""
    if isinstance(self.tokenizer, Path):
      files = {str(path): (self.tokenizer / path).read_bytes() for path in tokenizer_paths(self.tokenizer)}
    else:
      files = {name: text.encode() for name, text in self.tokenizer.items()}
    digest = hashlib.sha256(json.dumps([str(self.config), self.end_ids, self.pad_id]).encode())
    for name, content in files.items():
      digest.update(name.encode() + content)
    return digest.hexdigest()[:16]


def miniature_interface() -> TextInterface:
  """Of the miniature models that are trained here. A dialogue is its messages, each with a separator behind it."""
  ids = {"bos_token_id": BEGIN, "eos_token_id": END, "pad_token_id": PAD}

  def encode_dialogue(messages: Sequence[Message]) -> list[int]:
    first, *rest = messages
    return prompt_tokens(first.content) + [token for message in rest for token in (*encode(message.content), SEPARATOR)]

  def encode_answer(messages: Sequence[Message], answer: str) -> list[int]:
    del messages
    return [*encode(answer), END]

  return TextInterface(MINIATURE, encode_dialogue, decode, (END,), PAD, tokenizer_files(), ids, ids, encode_answer)


def interface_of(base: ModelFolder) -> TextInterface:
  """Of a Hugging Face model: its chat template, or plain text where it has none.

  Raises:
    ValueError: naming the folder, if it has no tokenizer, or nothing says how an answer ends.
  """
  tokenizer = base.tokenizer
  if tokenizer is None:
    raise ValueError(f"{base.folder}: has no tokenizer")
  if not base.end_ids:
    raise ValueError(f"{base.folder}: no eos_token_id, neither in its configs nor in its tokenizer")

  def encode_dialogue(messages: Sequence[Message]) -> list[int]:
    text = messages[-1].content
    try:
      if tokenizer.chat_template:
        turns = [{"role": message.role, "content": message.content} for message in messages]
        chat = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        ids: list[int] = tokenizer(chat, add_special_tokens=False)["input_ids"]  # the template has written them
      else:
        ids = tokenizer("\n".join(message.content for message in messages))["input_ids"]
    except Exception as error:  # of Jinja, of Rust
      raise ValueError(f"{base.folder}: its tokenizer cannot ask {text[:40]!r} ({error})") from error
    if not ids or max(ids) >= base.config.vocab_size:
      raise ValueError(
        f"{base.folder}: its tokenizer makes {ids[:20]} of {text[:40]!r}, and the model knows tokens 0 to "
        f"{base.config.vocab_size - 1}"
      )
    return ids

  def encode_answer(messages: Sequence[Message], answer: str) -> list[int]:
    """As the chat template has the model's turn, up to the token that ends it; else the text and the first end."""
    if tokenizer.chat_template:
      turns = [{"role": message.role, "content": message.content} for message in messages]
      asked = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
      whole = tokenizer.apply_chat_template([*turns, {"role": "assistant", "content": answer}], tokenize=False)
      if whole.startswith(asked):
        ids: list[int] = tokenizer(whole[len(asked) :], add_special_tokens=False)["input_ids"]
        if ends := [index for index, token in enumerate(ids) if token in base.end_ids]:
          return ids[: ends[0] + 1]
    return [*tokenizer(answer, add_special_tokens=False)["input_ids"], base.end_ids[0]]

  def decode_text(token_ids: Iterable[int]) -> str:
    return str(tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

  context = base.content.get("max_position_embeddings")
  pad_id = base.end_ids[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
  return TextInterface(
    base.config,
    encode_dialogue,
    decode_text,
    base.end_ids,
    pad_id,
    base.folder,
    base.content,
    base.generation,
    encode_answer,
    context if isinstance(context, int) and context > 0 else None,
  )
