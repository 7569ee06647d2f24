from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from molora import config
from molora.errors import UserError


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["trainig.lr=1"], "unknown key 'trainig'; did you mean 'training'"),
        (["training.lrr=1"], r"unknown key 'training\.lrr'; did you mean 'training\.lr'\?"),
        (["injection.attn_lora.enable=true"], r"did you mean 'injection\.attn_lora\.enabled'\?"),
        (["training.phases.0.trainables=[router]"], r"did you mean 'training\.phases\.0\.trainable'\?"),
        (["lr=1e-4"], r"--set lr=1e-4: unknown key 'lr'; did you mean 'training\.lr'\?"),
        (["batchsize=4"], r"did you mean 'training\.batch_size'\?"),
        (["moe.aux_loss_coef=1"], r"did you mean 'moe\.load_balance\.aux_loss_coef'\?"),
        (["moe.type=none"], r"did you mean 'moe\.load_balance\.type' or 'training\.type'\?"),
        (["injection.r=4"], r"did you mean 'injection\.lora_r'\?"),
        (["target_modules=[q_proj]"], r"did you mean 'injection\.target_keywords'\?"),
        (["injection.attn_lora.alpha=4"], r"did you mean 'injection\.lora_alpha'\?"),
        (["injection.nothing_like_it=1"], "known here: strategy, num_experts"),
        (["training.lr=.nan"], r"training\.lr: must be a finite number"),
        (["training.lr=-1e-5"], r"training\.lr: input should be greater than or equal to 0"),
        (["training.lr=fast"], r"training\.lr: input should be a valid number"),
        (["training.batch_size=2.5"], r"training\.batch_size"),
        (["training.batch_size=true"], r"training\.batch_size"),
        (["injection.top_k=5"], "top_k=5 is larger than num_experts=4"),
        (["injection.num_experts=1"], "at least 2"),
        (["injection.lora_dropout=1.0"], "lora_dropout"),
        (["training.type=dpo"], "trains type: sft only"),
        (["training.phases.0.step=3"], "the first phase starts at step 0"),
        (["training.phases=[{step: 0, trainable: [router]}, {step: 0, trainable: [lora]}]"], "out of order"),
        (["training.phases.0.trainable=[routers]"], r"training\.phases\.0\.trainable\.0"),
        (["training.phases.0.trainable=[]"], r"training\.phases\.0\.trainable"),
        (["injection.strategy=dense_lora", "training.phases.0.trainable=[router]"], "trains nothing"),
        (["training.phases.1.step=3"], "is a list of 1"),
        (["training.lr.x=3"], "is a value"),
        (["training.lr"], "write it as key.path=value"),
        (["training.lr=[1"], "not valid YAML"),
        (["training.lr=0x_"], "not valid YAML"),
        (["training.phases.²=1"], "use an index from 0 to 0, not '²'"),
        (["data.path=[]"], r"data\.path: an empty list names no file"),
        (["seed=18446744073709551616"], "seed: input should be less than"),
        (["moe.load_balance={type: none, type: aux_loss}"], "the key 'type' is there twice"),
    ],
)
def test_bad_values_are_explained(overrides: list[str], message: str) -> None:
    if "training.lr.x" in overrides[0]:
        overrides = ["training.lr=1", *overrides]
    with pytest.raises(UserError, match=message):
        config.load(None, overrides)


def test_every_problem_is_told_at_once() -> None:
    with pytest.raises(UserError) as error:
        config.load(None, ["training.lrr=1", "injection.lora_rr=2"])
    assert "'training.lrr'" in str(error.value)
    assert "'injection.lora_rr'" in str(error.value)


def test_a_problem_is_told_of_where_it_came_from(tmp_path: Path) -> None:
    path = tmp_path / "p.yml"
    path.write_text("seed: -1\ninjection: {num_experts: 4}")
    with pytest.raises(UserError) as error:
        config.load(path, ["injection.top_k=5", "training.phases.0.step=x", "logging.wandb=false"])
    told = str(error.value)
    assert "--set training.phases.0.step=x: training.phases.0.step: input" in told
    assert f"{path}: seed: input" in told
    assert f"{path} with --set injection.top_k=5: injection: top_k=5 is larger than num_experts=4" in told
    assert "wandb" not in told


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: [", "not valid YAML"),
        ("- 1", "expected keys"),
        ("\x00", "not valid YAML"),
        ("seed: 0x_", "not valid YAML"),
        ("training:\n  lr: 1\n  batch_size: 1\n  lr: 2", "the key 'lr' is there twice .*line 4"),
    ],
)
def test_bad_files_are_explained(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "p.yml"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        config.load(path)
    with pytest.raises(UserError, match="no such file"):
        config.load(tmp_path / "none.yml")


def test_overrides_mean_what_yaml_means() -> None:
    loaded = config.load(None, ["training.lr=1e-5", "training.phases.0.trainable=[lora]", "model_name=a=b", "seed=3"])
    assert loaded.training.lr == 1e-5
    assert loaded.training.phases[0].trainable == ["lora"]
    assert loaded.model_name == "a=b"
    assert config.load(None, ["training.lr=0"]).training.lr == 0
    assert config.load(None, ["data.path=2024-13-45"]).data.path == "2024-13-45"


def test_what_is_saved_loads_as_the_same(tmp_path: Path) -> None:
    before = config.resolve(config.load(None, ["training.step_unit=micro", "training.grad_accum_steps=3"]))
    path = tmp_path / "config.yml"
    path.write_text(config.to_yaml(before))
    assert config.resolve(config.load(path)) == before


def test_micro_steps_become_optimizer_steps_once() -> None:
    loaded = config.load(
        None,
        [
            "training.step_unit=micro",
            "training.grad_accum_steps=2",
            "training.max_train_steps=5",
            "training.warmup_steps=3",
            "training.val_steps=0",
            "training.phases=[{step: 0, trainable: [router]}, {step: 3, trainable: [lora]}]",
        ],
    )
    training = config.resolve(loaded).training
    assert (training.max_train_steps, training.warmup_steps, training.val_steps) == (3, 2, 0)
    assert [phase.step for phase in training.phases] == [0, 2]
    assert training.in_optimizer_steps() is training


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=4),
        lambda inner: (
            st.lists(inner, max_size=2)
            | st.dictionaries(
                st.sampled_from(["training", "phases", "lr", "injection", "top_k", "moe", "data", "path", "x"]),
                inner,
                max_size=3,
            )
        ),
        max_leaves=10,
    )
)
def test_whatever_the_tree_it_is_checked_or_explained(tree: object) -> None:
    overrides = [f"{key}={yaml.safe_dump(value)}" for key, value in tree.items()] if isinstance(tree, dict) else []
    try:
        config.resolve(config.load(None, overrides))
    except UserError as error:
        assert str(error)


def test_phases_of_one_optimizer_step_are_named_as_they_were_written() -> None:
    phases = ", ".join(f"{{step: {step}, trainable: [lora]}}" for step in range(3))
    units = ["training.step_unit=micro", "training.grad_accum_steps=4"]
    loaded = config.load(None, [*units, f"training.phases=[{phases}]"])
    with pytest.raises(UserError, match=r"phases\.1\.step=1 and training\.phases\.2\.step=2 are one optimizer step"):
        config.resolve(loaded)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        (
            "training.phases=[{step: 0, trainable: [router]}, {step: 7, trainable: [lora]}]",
            "begins at optimizer step 4 and training ends after 4",
        ),
        ("training.warmup_steps=7", "warm-up of 4 optimizer steps is not over"),
        ("training.val_steps=7", "val_steps=4 evaluates nothing"),
    ],
)
def test_what_has_no_effect_is_told(override: str, told: str) -> None:
    fixed = ["training.step_unit=micro", "training.grad_accum_steps=2", "training.max_train_steps=8"]
    (found,) = config.without_effect(config.resolve(config.load(None, [*fixed, override])).training)
    assert told in found


def key_paths(tree: dict[str, object], before: str = "") -> list[str]:
    """Every key of a configuration, sections too, as ``--set`` names them."""
    paths: list[str] = []
    for key, value in tree.items():
        paths.append(before + key)
        if isinstance(value, dict):
            paths += key_paths(value, f"{before}{key}.")
    return paths


@given(
    st.dictionaries(
        st.sampled_from(key_paths(config.Config().model_dump())),
        st.one_of(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
            st.lists(st.integers(-3, 5) | st.sampled_from(["router", "lora", "q_proj"]), max_size=3),
            st.sampled_from([float("nan"), float("inf"), -1, 10**400]),
            st.sampled_from(["aux_loss_free", "mlp", "micro", "bf16", "dense_lora", "1e-5", ".nan", "[", "{a: 1}"]),
        ),
        max_size=4,
    )
)
def test_whatever_the_keys_hold_is_checked_or_explained(values: dict[str, object]) -> None:
    overrides = [f"{key}={value if isinstance(value, str) else yaml.safe_dump(value)}" for key, value in values.items()]
    try:
        loaded = config.resolve(config.load(None, overrides))
    except UserError as error:
        assert str(error)
    else:
        assert config.check(config.Config, yaml.safe_load(config.to_yaml(loaded))) == loaded


@given(
    st.text(max_size=80).map(str.encode)
    | st.text(alphabet=" \n:-[]{}'\"#&*!|>%@`\tabc01.", max_size=60).map(str.encode)
    | st.binary(max_size=20)
)
def test_whatever_the_file_holds_it_is_a_configuration_or_explained(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.yml"
    path.write_bytes(content)
    try:
        config.load(path)
    except UserError as error:
        assert str(error)
