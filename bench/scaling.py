"""`python -m bench.scaling`: the tables of docs/scaling.md, from the same counts as `plan=true`. Nothing is run."""

from dataclasses import replace
from functools import cache

from caldera import Method
from sweeps import sizes as bytes_of
from sweeps.estimate import Estimate, estimate
from sweeps.machine import Machine
from sweeps.outline import Outline, outline
from sweeps.sizes import Sizes

# Published configurations: Touvron et al. 2023 (arXiv 2307.09288), Grattafiori et al. 2024 (arXiv 2407.21783, table 3).
MODELS = {
    "LLaMa-2 7B": {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
                   "intermediate_size": 11008, "vocab_size": 32000},
    "LLaMa-2 70B": {"hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8,
                    "intermediate_size": 28672, "vocab_size": 32000},
    "LLaMa-3 8B": {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
                   "intermediate_size": 14336, "vocab_size": 128256},
    "LLaMa-3.1 405B": {"hidden_size": 16384, "num_hidden_layers": 126, "num_attention_heads": 128,
                       "num_key_value_heads": 8, "intermediate_size": 53248, "vocab_size": 128256},
}  # fmt: skip
RANK = Method(rank=64, outer_iterations=15, inner_iterations=10, patience=15)  # the paper's
TRELLIS = Method(rank=0, q="trellis_2bit")
TASKS = ("winogrande", "rte", "piqa", "arc_easy", "arc_challenge")
KINDS = {  # name -> method, inputs behind the compressed prefix
    "E8P rank 64, 15 x 10": (RANK, False),
    "E8P rank 64, 2 x 5, corrected": (replace(RANK, outer_iterations=2, inner_iterations=5), True),
    "trellis rank 0": (TRELLIS, False),
}
CARDS = 8


@cache
def model(name: str) -> Outline:
    from transformers import LlamaConfig

    return outline(LlamaConfig(**MODELS[name], tie_word_embeddings=False))


def sizes(name: str, kind: str) -> Sizes:
    """256 x 4096 tokens of calibration, 166 x 2048 (WikiText-2's test text) of evaluation, five tasks."""
    method, corrected = KINDS[kind]
    found = model(name)
    rest = {"tasks": TASKS, "workers": 1, "corrected": corrected}
    return Sizes(found, tuple(found.matrices), method, calibration=(256, 4096), evaluation=(166, 2048), **rest)


@cache
def predicted(name: str, kind: str) -> Estimate:
    return estimate(sizes(name, kind), Machine.h100())


def on_cards(name: str, kind: str, cards: int = CARDS) -> float:
    """Seconds on several cards: of the stages only a fit to the original inputs is shared out, block by block."""
    found = predicted(name, kind)
    compress = found.stages["compress"].seconds
    return found.seconds - compress + compress / (1 if KINDS[kind][1] else cards)


# -------------------------------------------------------------------------------------------------------------- tables
def markdown(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def short(value: float) -> str:
    """Three digits with a thousand's prefix."""
    for size, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= size:
            return f"{value / size:.3g} {prefix}"
    return f"{value:.3g} "


def hours(seconds: float) -> str:
    return f"{seconds / 3600:.2g} h" if seconds >= 3600 else f"{seconds / 60:.2g} min"


def operations() -> str:
    rows = []
    for name in MODELS:
        found, prefix = predicted(name, "E8P rank 64, 15 x 10"), predicted(name, "E8P rank 64, 2 x 5, corrected")
        calibrate, compress = found.stages["calibrate"].work, found.stages["compress"].work
        searched = sum(compress.search.values())
        evaluation = sum(found.stages[stage].work.operations for stage in ("perplexity", "tasks"))
        counts = (calibrate.model, calibrate.mixed, compress.operations)
        behind = prefix.stages["compress"].work
        rows.append([name, *map(short, (*counts, searched, behind.model + behind.mixed, evaluation))])
    columns = ["", "calibrate: forward", "calibrate: moments", "compress: products", "compress: weights searched"]
    return markdown([*columns, "corrected: passes and moments", "evaluate"], rows)


def storage() -> str:
    rows = []
    for name in MODELS:
        own, prefix = sizes(name, "E8P rank 64, 15 x 10"), sizes(name, "E8P rank 64, 2 x 5, corrected")
        widest = max(group.width for group in own.all_groups())
        parts = [bytes_of.moments_bytes(own), 4.0 * widest**2, own.stream, bytes_of.hidden_bytes(prefix)]
        parts += [bytes_of.factors_bytes(own), bytes_of.subspaces_bytes(own)]
        parts += [bytes_of.stored_bytes(own) + bytes_of.rest_bytes(own), 2.0 * own.model.parameters]
        rows.append([name, *(f"{short(part)}B" for part in parts)])
    columns = ["", "moments", "largest H", "stream", "hidden states, corrected", "factors", "subspaces"]
    return markdown([*columns, "checkpoint", "dense, 16 bits"], rows)


def times() -> str:
    rows = []
    for name in MODELS:
        for kind in KINDS:
            found = predicted(name, kind)
            stages = found.stages
            evaluation = sum(stages[stage].seconds for stage in ("load", "perplexity", "tasks"))
            limit = max(stages["compress"].limits, key=stages["compress"].limits.get)
            parts = (stages["calibrate"].seconds, stages["compress"].seconds, evaluation, found.seconds)
            rows.append([name, kind, *map(hours, parts), limit, hours(on_cards(name, kind))])
    columns = ["", "", "calibrate", "compress", "evaluate", "all, with the uncompressed model", "compress is bound by"]
    return markdown([*columns, f"all, {CARDS} cards"], rows)


def memory() -> str:
    rows = []
    for name in MODELS:
        found = predicted(name, "E8P rank 64, 15 x 10").stages
        prefix = predicted(name, "E8P rank 64, 2 x 5, corrected").stages
        parts = (found["calibrate"], found["compress"], prefix["compress"], found["perplexity"], found["tasks"])
        rows.append([name, *(f"{short(stage.memory)}B" for stage in parts)])
    return markdown(["", "calibrate", "compress", "compress, corrected", "perplexity", "tasks"], rows)


TABLES = {"Operations": operations, "Bytes": storage, "Memory": memory, "Predicted on an H100": times}


def main() -> None:
    for title, table in TABLES.items():
        print(f"{title}\n\n{table()}\n")


if __name__ == "__main__":
    main()
