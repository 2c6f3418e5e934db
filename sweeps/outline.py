"""What counting needs to know of a model: shapes and sizes, from its configuration alone. No weight is read."""

import math
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from caldera.errors import UserError
from sweeps.store import digest, once

SHARING = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("gate", "up"), ("w1", "w3"))  # one input
WRITING = ("o_proj", "down_proj", "dense_4h_to_h", "c_proj", "out_proj", "fc2", "w2")  # into the residual stream
VERSION = 1


@dataclass(frozen=True)
class Group:
    """Matrices that receive the same input of `width`; a token reaches `share` of them (below 1: experts)."""

    name: str
    members: tuple[str, ...]
    width: int
    share: float
    writes: bool


@dataclass(frozen=True)
class Outline:
    """A causal LM. `matrices` are all of its decoder blocks', by full name; `parameters` are the whole model's."""

    prefix: str  # full names are `prefix.<block>.<name>`
    matrices: dict[str, list[int]]
    blocks: int
    hidden: int
    vocabulary: int
    attention: int  # heads x head size: as wide as what queries are multiplied with keys in
    parameters: int
    embedded: int  # parameters outside of the blocks that no head is: embeddings, last norm
    tied: bool
    share: float = 1.0  # of the experts, those that a token goes through

    @property
    def head(self) -> int:
        """Parameters of the product that gives the logits."""
        return self.vocabulary * self.hidden

    @property
    def in_blocks(self) -> int:
        """Parameters of all blocks' matrices."""
        return sum(math.prod(shape) for shape in self.matrices.values())

    @property
    def active(self) -> float:
        """Of them, those that a token is multiplied with."""
        return sum(math.prod(shape) * self.share_of(name) for name, shape in self.matrices.items())

    def share_of(self, name: str) -> float:
        return self.share if ".experts." in name else 1.0

    def groups(self, names: list[str] | dict) -> list[Group]:
        """Matrices that receive one tensor, among those of these full names, by the families' customary names."""
        found: dict[tuple, list[str]] = {}
        for name in names:
            parent, _, own = name.rpartition(".")
            kind = next((kind for kind in SHARING if own in kind), (own,))
            found.setdefault((parent, kind), []).append(name)
        return [self._group(members) for members in found.values()]

    def _group(self, members: list[str]) -> Group:
        writes = any(name.rpartition(".")[2] in WRITING for name in members) and ".experts." not in members[0]
        return Group(members[0], tuple(members), self.matrices[members[0]][1], self.share_of(members[0]), writes)

    def block_of(self, name: str) -> int:
        """The block of a matrix."""
        return int(re.match(r"\d+", name.removeprefix(f"{self.prefix}."))[0])


def outline_of(directory: Path, cache: Path, trust_remote_code: bool = False) -> Outline:
    """The outline of the model in a folder with a config.json; found once, then in the cache."""
    file = cache / "outlines" / f"{digest([VERSION, (directory / 'config.json').read_text()])}.json"
    found, _ = once(file, lambda: asdict(_read_outline(directory, trust_remote_code)))
    return Outline(**found)


def _read_outline(directory: Path, trust_remote_code: bool) -> Outline:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
        return outline(config, trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"model.path={directory} is no causal language model: {reason}") from error


def outline(config, trust_remote_code: bool = False) -> Outline:
    """The outline of the model of a transformers configuration, built without data."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    from caldera.blocks import decoder_blocks, named_matrices

    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    model.tie_weights()
    text = config.get_text_config()
    prefix, blocks = decoder_blocks(model)
    sizes = {id(p): p.numel() for p in model.parameters()}
    outside = {id(p): p.numel() for p in model.parameters()}
    for p in blocks.parameters():
        outside.pop(id(p), None)
    head, entry = model.get_output_embeddings(), model.get_input_embeddings()
    tied = head is None or head.weight is entry.weight
    heads = getattr(text, "num_attention_heads", None)
    heads = heads if isinstance(heads, int) else 0  # none, or other ones in each block: attention is not counted
    width = getattr(text, "head_dim", None) or text.hidden_size // max(heads, 1)
    experts = getattr(text, "num_local_experts", None) or getattr(text, "num_experts", None) or 1
    share = (getattr(text, "num_experts_per_tok", None) or experts) / experts
    return Outline(
        prefix=prefix,
        matrices={name: list(matrix.shape) for name, matrix in named_matrices(model).items()},
        blocks=len(blocks),
        hidden=text.hidden_size,
        vocabulary=text.vocab_size,
        attention=heads * width,
        parameters=sum(sizes.values()),
        embedded=sum(outside.values()) - (0 if tied else sum(p.numel() for p in head.parameters())),
        tied=tied,
        share=share,
    )
