"""What an experiment on one model consists of, and the small one that `make demo` runs.

Defaults are those of SEAL (arXiv 2506.10943; its run files and scripts), but for ``grader`` and
``padding_in_loss``, whose comments name them; a model, its data and its machine have none.
Of the arms, ``hand_written`` is ours and needs passages that have such texts. What each setting is
called in a notebook stands in ``tables``.
"""

from dataclasses import dataclass

from seal_nb.errors import SettingsError
from seal_nb.experiments.settings import ARMS, Arm
from seal_nb.inner_loop_settings import DTYPES

ENGINES = ("local", "vllm")


@dataclass(frozen=True, kw_only=True)
class ExperimentSettings:
    """Counts, texts, and how adapters and models are trained."""

    model: str
    train_dataset: str
    val_dataset: str
    n_train: int = 50  # passages of a ReST-EM round
    n_val: int = 200  # passages of an evaluation
    k_completions: int = 5  # self-edits a training passage
    eval_times: int = 3  # adapters a self-edit when it is ranked
    n_rounds: int = 2
    arms: tuple[Arm, ...] = ("passage_only", "self_edits")  # of round 0, single passage and CPT
    prompt_key: str = "implications"  # what the model is asked for; a key, a family, or a text file
    engine: str = "local"  # writes the self-edits: local, or vllm (a server of each such stage's own)
    max_tokens: int = 8192  # of one self-edit
    max_new_tokens: int = 64  # of an answer
    seed: int = 42
    shuffle: bool = False  # the published order of a dataset that is not in that order yet

    target_modules: tuple[str, ...] = ()  # of the inner loop; empty: PEFT's default
    lora_rank: int = 32
    lora_alpha: float = 64
    finetune_epochs: int = 10
    finetune_lr: float = 1e-3
    padding_in_loss: bool = False  # published: padded to 2048 tokens and trained on that
    grader: str = "local"  # of the servers; published: GPT-4.1, judge:gpt-4.1
    dtype: str = "auto"  # of the servers' base model
    deterministic: bool = False  # servers do one text at a time: the same bits every time, and slower

    cpt_completions: int = 5  # self-edits a validation passage in the one adapter
    cpt_epochs: int = 3
    cpt_lr: float = 1e-3  # published for the passage-only arm: 1e-4
    cpt_batch_size: int = 4
    cpt_accumulation: int = 2  # published for the model after round 2: 1

    sft_lora_rank: int = 64
    sft_lora_alpha: int = 128
    sft_target_modules: tuple[str, ...] = ("all-linear",)
    sft_epochs: int = 2
    sft_lr: float = 3e-4
    sft_batch_size: int = 1
    sft_accumulation: int = 10  # micro-batches a step, of all processes; published: 5 on each of 2 GPUs

    continual_arm: Arm = "self_edits"
    continual_seeds: tuple[int, ...] = tuple(range(42, 50))  # a run each; published: 8
    n_sequences: int = 8  # of a run
    n_datapoints: int = 8  # passages of a sequence
    continual_max_new_tokens: int = 64

    n_workers: int
    n_threads: int
    n_slots: int = 0  # adapters in training at a time in one worker; 0: usual for the device
    sft_processes: int  # of a ReST-EM training, one GPU each; published: 2

    def __post_init__(self) -> None:
        if unknown := [arm for arm in (*self.arms, self.continual_arm) if arm not in ARMS]:
            raise SettingsError(f"arms: {', '.join(unknown)} not known; known are {', '.join(ARMS)}")
        if not self.continual_seeds or len(set(self.continual_seeds)) < len(self.continual_seeds):
            raise SettingsError(f"continual_seeds is {self.continual_seeds}; give at least one, each once")
        if not self.arms:
            raise SettingsError("arms is empty; name at least one of " + ", ".join(ARMS))
        if self.engine not in ENGINES:
            raise SettingsError(
                f"engine is {self.engine!r}; in a chain the model itself writes, by {' or '.join(ENGINES)}; "
                "for another's self-edits run 01_create_self_edits alone"
            )
        if self.dtype not in DTYPES:
            raise SettingsError(f"dtype is {self.dtype!r}; it must be one of {', '.join(DTYPES)}")
        if self.sft_processes < 1 or self.sft_accumulation % self.sft_processes:
            raise SettingsError(
                f"sft_accumulation is {self.sft_accumulation}, which {self.sft_processes} sft_processes "
                "cannot share; it counts the micro-batches of all of them: give a multiple"
            )


# About 15 minutes on 2 cores. The small model learns nothing through q_proj and v_proj alone; two of the MLP
# layers teach it what all seven linear layers do, for two thirds of the time.
DEMO = ExperimentSettings(
    model="embedded",
    train_dataset="shipped:train",
    val_dataset="shipped:val",
    n_train=4,
    n_val=6,
    k_completions=2,
    eval_times=1,
    arms=("passage_only", "self_edits", "hand_written"),
    max_tokens=80,
    target_modules=("up_proj", "down_proj"),
    lora_rank=16,
    lora_alpha=32,
    finetune_epochs=6,
    finetune_lr=3e-3,
    cpt_completions=1,
    cpt_lr=3e-3,
    cpt_accumulation=1,
    sft_accumulation=1,  # four examples: with ten a step there would be two steps
    continual_seeds=(42,),
    n_sequences=2,
    n_datapoints=3,
    continual_max_new_tokens=32,
    n_workers=2,
    n_threads=1,
    n_slots=8,
    sft_processes=1,
)
