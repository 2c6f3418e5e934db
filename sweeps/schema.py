"""The typed configuration. Every key that a YAML or an override may set is here; any other is refused by name."""

from dataclasses import dataclass, field

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING


@dataclass
class ModelConfig:
    """A causal LM: a local folder or hub id in `path`, or a GGUF file that an installed package carries.

    Compressed are the matrices of the decoder blocks whose full name fits a pattern of `include` (as in a shell: `*`,
    `?`, `[...]`) and none of `exclude`.
    """

    name: str | None = None  # null: the last part of the path
    path: str | None = None
    gguf_package: str | None = None
    gguf_file: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    include: list[str] = field(default_factory=lambda: ["*"])
    exclude: list[str] = field(default_factory=lambda: ["*.gate", "*.router", "*_gate"])  # what routes tokens


@dataclass
class CalibrationConfig:
    """`sequences` rows of `length` tokens of `text`: a name from `sweeps.texts`, a file or a folder."""

    text: str = MISSING
    sequences: int = MISSING
    length: int = MISSING
    shuffle_seed: int = 0
    allow_overlap: bool = False


@dataclass
class QuantizerConfig:
    """`family` at `bits`; `scale` says what shares a scale: matrix, row, or g<columns> of a row.

    The 16-bit families, and `none` for Q, have no bits to choose.
    """

    family: str = MISSING
    bits: int = 16
    scale: str = "matrix"


@dataclass
class RankConfig:
    """The rank k of every compressed matrix; null when the budget decides."""

    k: int | None = 0


@dataclass
class BudgetConfig:
    """What the points may weigh: stored `bits` a parameter, or `megabytes` (10^6 bytes), of the compressed matrices or,
    with the scope `model`, of the checkpoint's tensor files.

    The strategy `uniform` buys the largest rank for all matrices. `allocated` chooses rank and quantizers for each, of
    a menu: `ranks` at which errors are predicted, and all between; `q`, `l`, `r`, names of quantizers (none named: Q's
    family at up to 4 bits, and the factors' own). Losses are weighted by the Fisher information on
    `sensitivity_rows` rows of the calibration, or, with the sensitivity `none`, all squared relative errors alike.
    `table` repeats what another point's record says of its matrices.
    """

    strategy: str = "none"
    bits: float | None = None
    megabytes: float | None = None
    scope: str = "matrices"
    ranks: list[int] = field(default_factory=lambda: [0, 16, 32, 64])
    q: list[str] = field(default_factory=list)
    l: list[str] = field(default_factory=list)
    r: list[str] = field(default_factory=list)
    sensitivity: str = "fisher"
    sensitivity_rows: int = 4
    table: str | None = None


@dataclass
class MethodConfig:
    """The fields of `caldera.Method` that are neither axes nor the seed, its name for records, and the inputs.

    The name `none` stands for the uncompressed model. `inputs`: `original`, the original model's, or `corrected`, those
    behind the compressed prefix, with the strengths and the damping of `caldera.correction.Correction`.
    """

    name: str = MISSING
    outer_iterations: int = 3
    inner_iterations: int = 5
    order: str = "lr_first"
    warm_start: bool = True
    rotate: bool = True
    transform: bool = True
    tune_passes: int = 2
    sigma: float = 3e-3
    tolerance: float = 1e-4
    patience: int = 3
    moments: str = "measured"  # or identity: the fit takes H = I
    init: str = "zero"  # or svd, whitened, odlri: factors before the first step
    init_rank: int | str | None = None  # dimensions that they take at most; auto: SRR's criterion; null: all
    init_channels: int = 16  # odlri: how many inputs of largest moments
    downdate: bool = False
    inputs: str = "original"
    correction: float = 0.3
    correction_last: float | None = None
    residual: float = 0.3
    residual_last: float | None = None
    correction_sigma: float = 1e-2
    correction_preserve: bool = True


@dataclass
class EvaluationConfig:
    """Scores on `rows` windows (null: all) of `length` tokens of `text`, and lm-eval `tasks` on `limit` documents each.

    Windows begin `stride` tokens apart (null: they do not overlap), each with a `bos` token if that is true. Documents
    end with the end-of-sequence token, or are joined by `join`. The divergence from the uncompressed model is measured
    by `kl_tokens` of each of its distributions (0: not at all). `noise_floor`: how far off the uncompressed model is
    from itself in float32.
    """

    text: str = MISSING
    rows: int | None = MISSING
    length: int = MISSING
    stride: int | None = None
    bos: bool = False
    join: str | None = None
    label: str | None = None  # what metrics call the text; null: the last part of its path
    kl_tokens: int = 24
    noise_floor: bool = False
    tasks: list[str] = field(default_factory=list)
    limit: int | None = None
    batch_size: int = 8


@dataclass
class TrackerConfig:
    """Where a copy of each record goes: `wandb` or `none`. `mode` is W&B's: offline, online or disabled.

    `artifact`: the packed checkpoint goes there too.
    """

    name: str = MISSING
    mode: str = "offline"
    project: str = "caldera-sweeps"
    entity: str | None = None
    artifact: bool = False


@dataclass
class ComputeConfig:
    """`device` as torch names it; `dtype` of the evaluated model; `threads` 0 = torch's choice.

    Compression runs in `workers` processes, which divide the threads and the GPUs among them (0: as many as pay); with
    `backend` ray they belong to the Ray cluster that RAY_ADDRESS names, or to a local one. Results are the same.
    Hidden states of the calibration rows that take more than `spill_mb` megabytes (2^20 bytes) go to the cache's disk.
    """

    device: str = "auto"
    dtype: str = "auto"
    threads: int = 0
    workers: int = 0
    backend: str = "loky"
    spill_mb: int = 64


@dataclass
class CheckpointConfig:
    """Which packed checkpoints stay once they are evaluated: `all`, `none`, or those of `pareto`-optimal points.

    Dominated is a point when another of its sweep and model has no more stored bits and no worse a score.
    """

    keep: str = "all"


@dataclass
class SearchConfig:
    """`hydra/sweeper=optuna`: points are suggested until `trials` of the study have finished, `batch` at a time.

    `objectives`: `bits/stored`, `bits/nominal`, `bits/model`, and metrics, of which the first counts that begins so.
    Of `screen` suggestions the one is computed that promises most by its bits and its predicted error, measured on
    `blocks` blocks; one is pruned when a finished point has no more bits and a predicted error lower by `prune_margin`
    of it (null: never).
    """

    objectives: list[str] = field(default_factory=lambda: ["bits/stored", "perplexity"])
    trials: int = 12
    batch: int = 1
    screen: int = 64
    blocks: int = 4
    prune_margin: float | None = 0.05


@dataclass
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    q: QuantizerConfig = field(default_factory=QuantizerConfig)
    l: QuantizerConfig = field(default_factory=QuantizerConfig)
    r: QuantizerConfig = field(default_factory=QuantizerConfig)
    rank: RankConfig = field(default_factory=RankConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    sweep: str = "default"  # groups the points of one study, in the records and in W&B
    results: str = "results"  # folder of the records
    cache: str | None = None  # folder of what points share; null: $CALDERA_CACHE or the user's cache folder
    seed: int = 0
    plan: bool = False  # only say what the points would take
    retry: str | None = None  # a sweep, or its results folder: run its points that are not done, as they were planned
    force: bool = False  # compute a point again although its record is there


def register() -> None:
    """Make the schema known to Hydra as `schema`, which conf/config.yaml builds on."""
    ConfigStore.instance().store(name="schema", node=Config)
