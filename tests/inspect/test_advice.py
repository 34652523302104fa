"""Each sentence appears when the figures say so, and not otherwise."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from inspection_cases import tiny_config

from cqd_jax.hub.load import ModelFolder
from cqd_jax.hub.tensor_files import Tensor
from cqd_jax.inspect.advice import advice, relation, share_text
from cqd_jax.inspect.measure import KINDS, InspectedExpert, Inspection


def expert_of(tmp_path, name, **changes):
  """A full model of low rank, unless stated otherwise."""
  figures = {
    "folder": tmp_path / name,
    "kind": "full model",
    "is_adapter": False,
    "ranks": (),
    "dtype": "float32",
    "num_bytes": 1,
    "declared_base": None,
    "num_changed": 1,
    "norm": 1.0,
    "shares": {"mlp": 1.0},
    "energy": np.array([0.8, 0.95, 0.98, 0.995]),
    "sampled": False,
  }
  figures |= changes
  figures["shares"] = {kind: figures["shares"].get(kind, 0.0) for kind in KINDS}
  return InspectedExpert(name=name, **figures)


def lora_of(tmp_path, name, ranks=(2,), **changes):
  return expert_of(tmp_path, name, kind="LoRA adapter", is_adapter=True, ranks=ranks, **changes)


def said(tmp_path, *experts, cosine=0.3, dtype=jnp.float32, tied=False):
  """The sentences on experts whose pairs all have one cosine."""
  tensor = Tensor("weight", tmp_path / "model.safetensors", 0, (1,), np.dtype(dtype))
  base = ModelFolder(tmp_path / "llama", tiny_config(tie_embeddings=tied), {}, {}, {"weight": tensor})
  size = len(experts)
  cosines = np.where(np.eye(size, dtype=bool), 1.0, np.broadcast_to(cosine, (size, size)))
  zero = np.array([expert.norm == 0 for expert in experts])
  cosines = np.where(zero | zero[:, None], np.nan, cosines)
  shared = np.ones((size, size), int)
  return advice(Inspection(base, 100, 10.0, 7, experts, {}, cosines, np.ones((size, size)), shared, 4))


def one(sentences, start):
  (found,) = [sentence for sentence in sentences if start in sentence]
  return found


def test_nothing_is_said_twice_and_one_expert_has_no_pairs(tmp_path):
  sentences = said(tmp_path, expert_of(tmp_path, "coder"))
  assert len(sentences) == 1
  assert sentences[0].startswith("Rank 2 keeps at least 90% of the energy in matrices (coder 95.0%), and 99% needs 4:")


def test_the_base_again(tmp_path):
  zero = {"norm": 0.0, "shares": {}, "energy": np.full(4, math.nan)}
  sentences = said(tmp_path, expert_of(tmp_path, "copy", **zero), expert_of(tmp_path, "coder"))
  assert sentences[0].startswith("copy is equal to the base")
  assert len(sentences) == 2  # and the rank of coder
  both = said(tmp_path, expert_of(tmp_path, "a", **zero), lora_of(tmp_path, "b", **zero))
  assert len(both) == 1
  assert both[0].startswith("a and b are equal to the base")


@pytest.mark.parametrize(
  ("cosine", "kind"),
  [
    (1.0, "nearly the same"),
    (0.951, "nearly the same"),
    (0.94, "overlapping"),
    (0.11, "overlapping"),
    (0.09, "nearly orthogonal"),
    (-0.09, "nearly orthogonal"),
    (-0.11, "opposed"),
    (-1.0, "opposed"),
  ],
)
def test_relations(tmp_path, cosine, kind):
  assert relation(cosine) == kind
  sentence = one(said(tmp_path, expert_of(tmp_path, "a"), expert_of(tmp_path, "b"), cosine=cosine), "a and b:")
  assert f"a and b: {kind} (cosine {cosine:.2f}):" in sentence
  assert "rule of thumb" in sentence.lower()


def test_pairs_of_one_kind_share_a_sentence(tmp_path):
  three = [expert_of(tmp_path, name) for name in "abc"]
  assert "All pairs: nearly orthogonal (cosine 0.00):" in "".join(said(tmp_path, *three, cosine=-0.001))
  mixed = np.array([[1.0, 0.98, 0.01], [0.98, 1.0, 0.04], [0.01, 0.04, 1.0]])
  sentences = said(tmp_path, *three, cosine=mixed)
  assert "a and b: nearly the same (cosine 0.98)" in one(sentences, "nearly the same")
  assert one(sentences, "orthogonal").startswith("a and c; b and c: nearly orthogonal (cosine 0.01 to 0.04)")


def test_norms_that_differ_much(tmp_path):
  near = said(tmp_path, expert_of(tmp_path, "a", norm=4.9), expert_of(tmp_path, "b"))
  assert not [sentence for sentence in near if "times as long" in sentence]
  far = said(tmp_path, expert_of(tmp_path, "a", norm=0.5), expert_of(tmp_path, "b"), expert_of(tmp_path, "c", norm=3.5))
  sentence = one(far, "times as long")
  assert "The task vector of c is 7.0 times as long as that of a (3.5 and 0.5)" in sentence
  assert "rule of thumb" in sentence


def test_the_rank_is_that_of_the_expert_that_needs_most(tmp_path):
  slow = np.array([0.5, 0.7, 0.91, 0.96])
  sentence = one(said(tmp_path, expert_of(tmp_path, "a"), expert_of(tmp_path, "b", energy=slow)), "--evolution.rank")
  assert sentence.startswith(
    "Rank 3 keeps at least 90% of the energy in matrices (a 98.0% and b 91.0%), and 99% needs more than 4:"
  )
  assert "--evolution.genotype core --evolution.rank 3" in sentence


def test_what_is_not_of_low_rank(tmp_path):
  spread = np.array([0.1, 0.2, 0.3, 0.4])
  sentences = said(tmp_path, expert_of(tmp_path, "a", energy=spread), expert_of(tmp_path, "b"))
  assert "rank 4 keeps a 40.0%." in one(sentences, "Not of low rank")
  assert "(b 95.0%)" in one(sentences, "Rank 2 keeps")
  assert not [text for text in said(tmp_path, expert_of(tmp_path, "a", energy=spread)) if text.startswith("Rank")]


def test_adapters_are_exact(tmp_path):
  spread = np.array([0.1, 0.2, 0.3, 0.4])
  sentences = said(tmp_path, lora_of(tmp_path, "a", energy=spread), lora_of(tmp_path, "b", ranks=(4, 8, 16)))
  assert one(sentences, "exactly").startswith("a (rank 2) and b (ranks 4 to 16) are LoRA adapters: core space holds")
  assert not [text for text in sentences if "--evolution.rank " in text and "whatever" not in text]
  alone = said(tmp_path, lora_of(tmp_path, "a"))
  assert alone == [
    "a (rank 2) is a LoRA adapter: core space holds its matrices exactly, whatever --evolution.rank says."
  ]


def test_an_adapter_of_biases_alone(tmp_path):
  only = {"shares": {"biases": 1.0}, "energy": np.full(4, math.nan), "dtype": ""}
  sentences = said(tmp_path, lora_of(tmp_path, "a", ranks=(), **only))
  assert len(sentences) == 1
  assert sentences[0].startswith("Changed vectors: a (biases, 100.0% of its energy).")


def test_vectors_and_tied_embeddings(tmp_path):
  shares = {"mlp": 0.7, "norms": 0.0001, "biases": 0.1, "embedding": 0.1999}
  own = expert_of(tmp_path, "a", shares=shares), expert_of(tmp_path, "b")
  untied, tied = said(tmp_path, *own), said(tmp_path, *own, tied=True)
  assert "Changed vectors: a (norms and biases, 10.0% of its energy)." in one(untied, "vLLM")
  assert not [text for text in untied if "tie_word_embeddings" in text]
  assert one(tied, "tie_word_embeddings").startswith("Changed embedding: a (embedding, 20.0% of its energy).")


def test_an_adapter_of_another_base(tmp_path):
  names = ["org/llama", "org/llama-instruct", "/somewhere/llama/"]
  experts = [lora_of(tmp_path, f"e{k}", declared_base=name) for k, name in enumerate(names)]
  sentence = one(said(tmp_path, *experts), "cannot be measured")
  assert sentence.startswith("e1 says that its base is org/llama-instruct; its shapes fit llama.")


def test_rounding_to_a_coarser_dtype(tmp_path):
  fine = said(tmp_path, expert_of(tmp_path, "a"), dtype=jnp.bfloat16)
  assert not [text for text in fine if "rounding" in text]
  sentence = one(said(tmp_path, expert_of(tmp_path, "a", dtype="bfloat16")), "rounding")
  assert "by about 0.15% of the base's norm (an estimate), and its whole task vector is 10.00% of it" in sentence


def test_the_estimate_of_rounding_is_near():
  weights = np.random.default_rng(0).normal(size=10_000).astype(np.float32)
  rounded = np.asarray(jnp.asarray(weights, jnp.bfloat16), np.float32)
  assert np.linalg.norm(rounded - weights) / np.linalg.norm(weights) == pytest.approx(0.0015, rel=0.2)


def test_shares_in_words():
  assert [share_text(share) for share in (0.0, 1e-9, 0.0004, 0.0006, 0.5, 1.0)] == [
    "0",
    "<0.1%",
    "<0.1%",
    "0.1%",
    "50.0%",
    "100.0%",
  ]


def test_many_names_are_cut_short(tmp_path):
  experts = [lora_of(tmp_path, f"e{k}") for k in range(9)]
  assert "e5 (rank 2) and 3 more are LoRA adapters" in one(said(tmp_path, *experts), "exactly")
