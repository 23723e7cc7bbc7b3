"""The paper's recipe for its two models: the configurations load, fit the models, and run on 8 to
64 GPUs.
"""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from megatron_real import cli, config
from megatron_real.config import Config
from megatron_real.objective import KlConfig, Objective, make_objective

ROOT = Path(__file__).parents[2]
SHAPES = {  # of the DeepSeek-R1-Distill-Qwen models: heads, KV heads, hidden, ffn, vocabulary
    "1.5b": (12, 2, 1536, 8960, 151936),
    "7b": (28, 4, 3584, 18944, 152064),
}
GPUS_PER_NODE = 8


CONFIGS = ROOT / "examples/configs"
RUNS = sorted(
    path
    for path in CONFIGS.rglob("*.yaml")
    if path.name not in ("recipe.yaml", "1.5b.yaml", "7b.yaml") and path.parent.name != "compare"
)
SMALL = (
    "chain.yaml",
    "chain_stress.yaml",
    "quickstart.yaml",
    "smollm2.yaml",
    "smollm2_short.yaml",
    "sums.yaml",
    "sums_stress.yaml",
)
PAPER = [path for path in RUNS if path.name not in SMALL]


def model_directory(model: str, path: Path) -> Path:
    heads, kv_heads, hidden, ffn, vocabulary = SHAPES[model]
    shape = {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "num_hidden_layers": 28,
        "hidden_size": hidden, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "intermediate_size": ffn, "vocab_size": vocabulary, "max_position_embeddings": 131072,
        "tie_word_embeddings": False, "rms_norm_eps": 1e-6,
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(shape))
    return path


def recipe(model: str, tmp_path: Path) -> Config:
    return load(CONFIGS / f"real_{model}.yaml", model, tmp_path)


def load(file: Path, model: str, tmp_path: Path) -> Config:
    return config.load(file, [f"model.path={model_directory(model, tmp_path)}"])


@pytest.mark.parametrize("file", RUNS, ids=lambda path: path.stem)
def test_shipped_configurations_can_be_planned(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = model_directory("7b" if "7b" in file.name else "1.5b", tmp_path)
    words = [str(file), f"model.path={model}", "--gpus", "8", "--top", "1"]
    # The examples' own models have a smaller vocabulary and shorter answers: one sequence of theirs
    # fits in any case.
    assert cli.main(["plan", *words, "rollout.kv_cache_mib=24576", "--gpu", "h100-80g"]) == 0
    assert "fits: " in capsys.readouterr().out


def test_every_run_of_the_paper_is_there(tmp_path: Path) -> None:
    """Tables 1 and 2 have six rows at two sizes; Table 4 has temperatures, the anchor and KL."""
    rows = {"real", "bce", "vanilla", "grpo", "dapo", "gspo"}
    tables = {f"{row}_{size}" for row in rows for size in SHAPES}
    temperatures = {f"tau_{tau}" for tau in ("0.1", "0.25", "0.75", "1.0")}
    ablations = {"kl_old", "kl_reference"} | temperatures
    assert {path.stem for path in PAPER} == tables | ablations
    listed = (CONFIGS / "paper/README.md").read_text()
    for path in PAPER:
        assert path.name in listed or path.stem in temperatures


def differing(left: Any, right: Any, prefix: str = "") -> set[str]:
    """Returns the names of the settings that differ."""
    names = set()
    for name in {*left, *right}:
        if isinstance(left.get(name), dict) and isinstance(right.get(name), dict):
            names |= differing(left[name], right[name], f"{prefix}{name}.")
        elif left.get(name) != right.get(name):
            names.add(prefix + name)
    return names


@pytest.mark.parametrize("file", PAPER, ids=lambda path: path.stem)
def test_runs_of_the_paper_differ_in_their_objective_alone(file: Path, tmp_path: Path) -> None:
    size = "7b" if "7b" in file.name else "1.5b"
    run = config.to_dict(load(file, size, tmp_path))
    real = config.to_dict(recipe(size, tmp_path))
    other = {name for name in differing(run, real) if not name.startswith("objective.")}
    assert other <= {"trainer.run_dir"}
    assert run["trainer"]["run_dir"].endswith(file.stem)


@pytest.mark.parametrize("size", SHAPES)
def test_the_coefficients_of_each_objective_are_the_papers(size: str, tmp_path: Path) -> None:
    def objective(row: str) -> Objective:
        return load(CONFIGS / f"paper/{row}_{size}.yaml", size, tmp_path).objective

    reference = KlConfig(to="reference", estimator="k3", coefficient=0.001)
    assert recipe(size, tmp_path).objective == make_objective("real", variant="anchored", tau=0.5)
    assert objective("bce") == make_objective("real", variant="bce", tau=0.5)
    assert objective("vanilla") == make_objective("real", variant="vanilla", tau=0.5)
    assert objective("grpo") == make_objective("grpo", clip=0.2, kl=reference)
    assert objective("dapo") == make_objective("dapo", clip_low=0.2, clip_high=0.28)
    assert objective("gspo") == make_objective("gspo", clip_low=3e-4, clip_high=4e-4)


@pytest.mark.parametrize("to", ["old", "reference"])
def test_the_ablations_of_the_kl_are_the_papers(to: Any, tmp_path: Path) -> None:
    run = load(CONFIGS / f"paper/ablations/kl_{to}.yaml", "1.5b", tmp_path)
    assert run.objective == make_objective("real", kl=KlConfig(to=to, coefficient=0.001))


@pytest.mark.parametrize("model", SHAPES)
def test_the_recipe_is_the_papers(model: str, tmp_path: Path) -> None:
    recipe_config = recipe(model, tmp_path)
    assert (recipe_config.optimizer.lr, recipe_config.trainer.steps) == {
        "1.5b": (2e-6, 1400),
        "7b": (1e-6, 1000),
    }[model]
    assert recipe_config.optimizer.weight_decay == 0.01
    assert recipe_config.optimizer.beta1 == 0.9
    assert recipe_config.optimizer.beta2 == 0.999
    assert (recipe_config.optimizer.clip_grad, recipe_config.optimizer.schedule) == (
        1.0,
        "constant",
    )
    assert recipe_config.rollout.num_prompts == 128
    assert recipe_config.rollout.group_size == 8
    assert recipe_config.batch.minibatch_prompts == 32
    assert (recipe_config.data.max_prompt_tokens, recipe_config.rollout.max_response_tokens) == (
        1024,
        8192,
    )
    assert (recipe_config.rollout.temperature, recipe_config.rollout.top_p) == (0.6, 1.0)
    assert (recipe_config.evaluation.every, recipe_config.evaluation.samples) == (20, 8)
    assert (recipe_config.evaluation.top_p, recipe_config.labels.require_think) == (1.0, True)
    assert (
        recipe_config.data.suffix
        == r"Let's think step by step and output the final answer within \boxed{}."
    )


@pytest.mark.parametrize("gpus", [8, 16, 32, 64])
@pytest.mark.parametrize("model", SHAPES)
def test_the_layout_fits_the_number_of_gpus(model: str, gpus: int, tmp_path: Path) -> None:
    recipe_config = recipe(model, tmp_path)
    copies = config.check_world(recipe_config, gpus)
    assert copies * recipe_config.parallel.tp == gpus and recipe_config.parallel.tp <= GPUS_PER_NODE
    assert recipe_config.batch.minibatch_prompts * recipe_config.rollout.group_size >= copies, (
        "a copy without a sequence"
    )

    words = [
        str(ROOT / f"examples/configs/real_{model}.yaml"),
        f"model.path={tmp_path}",
        "--gpus",
        str(gpus),
    ]

    assert cli.main(["plan", *words, "--gpu", "h100-80g"]) == 0, "it does not fit into the memory"


@pytest.mark.parametrize(
    "script", ["real_1.5b.sh", "real_7b.sh", "slurm/job.sh", "slurm/node.sh", "slurm/words.sh"]
)
def test_every_script_parses(script: str) -> None:
    completed = subprocess.run(
        ["bash", "-n", ROOT / "examples" / script], capture_output=True, text=True
    )
    assert completed.returncode == 0 and not completed.stderr, completed.stderr


def test_the_two_scripts_differ_only_in_the_model() -> None:
    small, large = ((ROOT / f"examples/real_{model}.sh").read_text() for model in SHAPES)
    assert (
        small.replace("1.5B", "7B").replace("1.5b", "7b").replace("--nodes=1", "--nodes=2") == large
    )


OVERRIDES = {
    "trainer.steps=2  optimizer.lr=1e-4": ["trainer.steps=2", "optimizer.lr=1e-4"],
    "'data.suffix=step by step' a=1": ["data.suffix=step by step", "a=1"],
    'data.suffix="step by step"': ["data.suffix=step by step"],
    "data.suffix=$(touch hit)`touch hit`;touch": ["data.suffix=$(touch", "hit)`touch",
                                                  "hit`;touch"],
    "a=* b=~ c=$HOME d={1..3} e=<(ls) f=$((1/0))": [
        "a=*", "b=~", "c=$HOME", "d={1..3}", "e=<(ls)", "f=$((1/0))",
    ],
    "-n --help a=%s%d": ["-n", "--help", "a=%s%d"],
    "'it isn''t'": ["it isnt"],
    "": [],
}  # fmt: skip


@pytest.mark.parametrize("text", OVERRIDES)
def test_overrides_of_a_job_are_words_that_no_shell_reads(text: str, tmp_path: Path) -> None:
    script = f'source {ROOT}/examples/slurm/words.sh; words "$1" && printf "%s\\0" "${{words[@]}}"'
    completed = subprocess.run(
        ["bash", "-uc", script, "job", text], cwd=tmp_path, capture_output=True, text=True
    )
    assert completed.stdout.split("\0")[:-1] == (OVERRIDES[text] or [""]), completed.stderr
    assert not list(tmp_path.iterdir())


def test_an_open_quote_in_overrides_is_refused() -> None:
    script = f'source {ROOT}/examples/slurm/words.sh; words "it isn\'t"'
    assert subprocess.run(["bash", "-c", script], capture_output=True).returncode == 1


def test_no_value_of_a_users_block_is_read_by_a_shell() -> None:
    """eval and sh -c would read it as a command; without quotes it would be split, and its patterns
    expanded.
    """
    for script in ("job.sh", "node.sh", "words.sh"):
        text = (ROOT / "examples/slurm" / script).read_text()
        code = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
        assert not re.search(r"\b(eval|sh -c)\b", code), script
        # Once as an argument of `words`, once in the sentence that refuses it.
        uses = re.findall(r"\$\{?OVERRIDES\b.*", code)
        assert len(uses) == (2 if script == "job.sh" else 0)
