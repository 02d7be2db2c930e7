"""LoRA files: what diffusers writes and loads, and what the roles make of it."""

import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import add_adapters
from torch import Tensor, nn

from mfd_fast.models import build_model
from mfd_fast.models.diffusers_lora import FILE_NAME, load_lora, read_lora, save_lora, save_merged
from mfd_fast.models.lora import LoRARoles
from mfd_fast.models.sana import RELEASED_TARGETS, SanaNetwork, SanaRoles
from mfd_fast.student import Student

Make = Callable[..., Any]
SIGMAS = [1.0, 0.75, 0.5, 0.25]


def pipeline(transformer: nn.Module, sampler: str = "euler") -> Any:
    import diffusers

    scheduler = (
        diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
        if sampler == "euler"
        else diffusers.DPMSolverMultistepScheduler(
            algorithm_type="dpmsolver++", flow_shift=3.0, prediction_type="flow_prediction", use_flow_sigmas=True
        )
    )
    made = diffusers.SanaPipeline(
        tokenizer=None, text_encoder=None, vae=None, transformer=transformer, scheduler=scheduler
    )
    made.set_progress_bar_config(disable=True)
    return made


def latents(pipe: Any, noise: Tensor, batch: Any, sampler: str = "euler") -> Tensor:
    side = 32 * noise.shape[-1]
    options: dict[str, Any] = {"sigmas": SIGMAS} if sampler == "euler" else {}
    made: Tensor = pipe(
        prompt=None,
        prompt_embeds=batch.condition["prompt_embeds"],
        prompt_attention_mask=batch.condition["prompt_mask"],
        guidance_scale=1.0,
        latents=noise.clone(),
        num_inference_steps=4,
        output_type="latent",
        height=side,
        width=side,
        use_resolution_binning=False,
        return_dict=False,
        **options,
    )[0]
    return made


@pytest.mark.parametrize("sampler", ["euler", "dpm++"])
@pytest.mark.parametrize(("lora_alpha", "targets"), [(4, RELEASED_TARGETS), (8, RELEASED_TARGETS), (3, None)])
def test_the_pipeline_with_the_file_makes_the_students_latents(
    make_sana: Make,
    sana_batch: Any,
    randomize: Any,
    tmp_path: Path,
    lora_alpha: int,
    targets: Sequence[str] | None,
    sampler: str,
) -> None:
    roles, batch = SanaRoles(make_sana(), rank=4, lora_alpha=lora_alpha, targets=targets), sana_batch(3)
    randomize(roles)
    noise = torch.randn(batch.x.shape, generator=torch.Generator().manual_seed(1))
    student = Student(roles.student, (4, 8, 8), 4, 3.0, sampler=sampler)
    ours = student.generate(noise, batch.condition)
    file = save_lora(tmp_path / "lora", roles)
    assert file == tmp_path / "lora" / FILE_NAME
    pipe = pipeline(make_sana(), sampler)
    bare = latents(pipe, noise, batch, sampler)
    pipe.load_lora_weights(tmp_path / "lora")
    theirs = latents(pipe, noise, batch, sampler)
    assert (theirs - ours).norm() < 1e-4 * theirs.norm()
    assert (theirs - bare).norm() > 0.1 * theirs.norm()


def saved_by_diffusers(transformer: Any, folder: Path, adapter: str, with_metadata: bool) -> Path:
    from diffusers import SanaPipeline, training_utils
    from peft.utils import get_peft_model_state_dict

    if with_metadata and not hasattr(training_utils, "_collate_lora_metadata"):
        pytest.skip("this diffusers writes no rank and alpha into its files (before 0.35)")
    transformer.set_adapter(adapter)
    state = get_peft_model_state_dict(transformer, adapter_name=adapter)
    metadata = training_utils._collate_lora_metadata({"transformer": transformer}) if with_metadata else {}
    SanaPipeline.save_lora_weights(folder, transformer_lora_layers=state, **metadata)
    return folder


def test_keys_and_shapes_are_those_of_diffusers(make_sana: Make, tmp_path: Path) -> None:
    theirs = saved_by_diffusers(
        add_adapters(make_sana(), ["default"], r=4, lora_alpha=4), tmp_path / "theirs", "default", True
    )
    ours = save_lora(tmp_path / "ours.safetensors", SanaRoles(make_sana(), rank=4, lora_alpha=4))
    one, other = load_file(ours), load_file(theirs / FILE_NAME)
    assert one.keys() == other.keys()
    assert all((one[name].shape, one[name].dtype) == (other[name].shape, other[name].dtype) for name in one)
    metadata = []
    for file in (ours, theirs / FILE_NAME):
        with safe_open(file, framework="pt") as opened:
            metadata.append(json.loads(opened.metadata()["lora_adapter_metadata"]))
    assert metadata[0].keys() <= metadata[1].keys()
    assert metadata[0]["transformer.r"] == metadata[0]["transformer.lora_alpha"] == 4


@pytest.mark.parametrize(("alpha", "with_metadata"), [(4, False), (4, True), (8, True)])
def test_adapters_of_a_trainer_can_go_on(
    make_sana: Make, sana_batch: Any, tmp_path: Path, alpha: int, with_metadata: bool
) -> None:
    """Into roles of another alpha than the file's: the velocities are the transformer's with that adapter."""
    transformer, batch = add_adapters(make_sana(), ["default", "aux"], r=4, lora_alpha=alpha), sana_batch(3)
    folder = saved_by_diffusers(transformer, tmp_path / "checkpoint", "default", with_metadata)
    roles = SanaRoles(make_sana(), rank=4, lora_alpha=12)
    load_lora(folder, roles, "student")
    transformer.set_adapter("default")
    with torch.no_grad():
        expected = SanaNetwork(transformer).reference(batch.x, batch.t, **batch.condition)
        ours = roles.student(batch.x, batch.t, **batch.condition)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    assert not any(parameter.any() for name, parameter in roles._named("auxiliary").items() if "lora_B" in name)


@pytest.mark.parametrize("lora_alpha", [4.0, 6.0])
def test_written_and_read_again(make_sana: Make, randomize: Any, tmp_path: Path, lora_alpha: float) -> None:
    roles, other = (SanaRoles(make_sana(), rank=4, lora_alpha=lora_alpha, seed=seed) for seed in (0, 1))
    randomize(roles)
    load_lora(save_lora(tmp_path, roles, "auxiliary"), other, "auxiliary")
    for name, value in roles.state_dict("auxiliary").items():
        torch.testing.assert_close(other.state_dict("auxiliary")[name], value, rtol=1e-6, atol=0)


def test_merged_weights_are_read_by_diffusers(make_sana: Make, sana_batch: Any, randomize: Any, tmp_path: Path) -> None:
    from diffusers import SanaTransformer2DModel

    roles, batch = SanaRoles(make_sana(), rank=4), sana_batch(2)
    randomize(roles)
    save_merged(tmp_path / "transformer", roles)
    network = SanaNetwork(SanaTransformer2DModel.from_pretrained(tmp_path / "transformer"))
    with torch.no_grad():
        expected = roles.student(batch.x, batch.t, **batch.condition)
        velocity = network(batch.x, batch.t, **batch.condition)
    torch.testing.assert_close(velocity, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_other_spellings_of_a_lora_are_read(make_sana: Make, randomize: Any, tmp_path: Path) -> None:
    """Names of peft itself, and scales as tensors of their own."""
    roles = SanaRoles(make_sana(), rank=4)
    randomize(roles)
    tensors = load_file(save_lora(tmp_path / "plain", roles))
    peft = {name.replace("transformer.", "base_model.model.", 1): value for name, value in tensors.items()}
    save_file(
        {name.replace(".weight", ".default.weight"): value for name, value in peft.items()}, tmp_path / "p.safetensors"
    )
    state, scales = read_lora(tmp_path / "p.safetensors")
    assert state.keys() == roles.state_dict("student").keys()
    assert set(scales.values()) == {1.0}
    layer = next(iter(scales))
    save_file(tensors | {f"{layer}.alpha": torch.tensor(2.0)}, tmp_path / "a.safetensors")
    assert read_lora(tmp_path / "a.safetensors")[1][layer] == 0.5


def test_files_that_do_not_fit_are_refused(make_sana: Make, randomize: Any, tmp_path: Path) -> None:
    roles = SanaRoles(make_sana(), rank=4)
    randomize(roles)
    before = copy.deepcopy(roles.state_dict("student"))
    with pytest.raises(FileNotFoundError, match="there is no LoRA file"):
        load_lora(tmp_path / "nothing", roles)
    wide = save_lora(tmp_path / "wide", SanaRoles(make_sana(), rank=8))
    with pytest.raises(
        ValueError,
        match=r"lora_weights.safetensors does not fit the student: .* has shape \(8, 32\), expected \(4, 32\)",
    ):
        load_lora(wide, roles)
    tensors = load_file(save_lora(tmp_path / "good", roles))
    name = next(iter(tensors))
    save_file(tensors | {"text_encoder.bias": torch.ones(2)}, tmp_path / "strange.safetensors")
    with pytest.raises(ValueError, match=r"not a plain LoRA of a transformer: text_encoder\.bias"):
        load_lora(tmp_path / "strange.safetensors", roles)
    save_file({key: value for key, value in tensors.items() if key != name}, tmp_path / "half.safetensors")
    with pytest.raises(ValueError, match=r"lora_A or lora_B is missing for transformer\.transformer_blocks\.0"):
        load_lora(tmp_path / "half.safetensors", roles)
    metadata = {"lora_adapter_metadata": json.dumps({"transformer.rank_pattern": {"a": 2}})}
    save_file(tensors, tmp_path / "pattern.safetensors", metadata=metadata)
    with pytest.raises(ValueError, match="ranks or scales of its own"):
        load_lora(tmp_path / "pattern.safetensors", roles)
    assert all(torch.equal(before[key], value) for key, value in roles.state_dict("student").items())
    mlp = LoRARoles(build_model("mlp", (2,), width=8), rank=2, alpha=2.0)
    with pytest.raises(ValueError, match=r"expected weights transformer\.LAYER\.lora_A"):
        save_lora(tmp_path / "mlp", mlp)
    assert not (tmp_path / "mlp").exists()
    with pytest.raises(TypeError, match="merging needs roles on a transformer of diffusers, got MLP"):
        save_merged(tmp_path / "merged", mlp)


def _rank_two(**changes: Any) -> dict[str, Tensor]:
    layer = "transformer.blocks.0.to_q"
    given = {f"{layer}.lora_A.weight": torch.ones(2, 4), f"{layer}.lora_B.weight": torch.ones(4, 2)}
    return given | {f"{layer}.{name}": value for name, value in changes.items()}


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        (_rank_two(), "{", r"lora_adapter_metadata is not valid JSON"),
        (_rank_two(), "[" * 50_000, r"lora_adapter_metadata is not valid JSON"),
        (_rank_two(), "[1]", r"lora_adapter_metadata must be an object, got list"),
        (_rank_two(), '{"transformer.lora_alpha": [4]}', r"an alpha must be a number, got \[4\]"),
        (_rank_two(), '{"transformer.lora_alpha": 1e999}', "an alpha must be a number, got inf"),
        (_rank_two(alpha=torch.tensor(float("nan"))), "{}", "an alpha must be a number, got nan"),
        (_rank_two(alpha=torch.ones(2)), "{}", r"is not a plain LoRA of a transformer: .*to_q\.alpha"),
        (_rank_two(**{"lora_A.weight": torch.ones(0, 4)}), "{}", "has 0 rows in lora_A and 2 columns in lora_B"),
        (_rank_two(**{"lora_B.weight": torch.ones(4, 3)}), "{}", "has 2 rows in lora_A and 3 columns in lora_B"),
    ],
)
def test_damaged_lora_files_are_errors_in_words(
    tensors: dict[str, Tensor], metadata: str, message: str, tmp_path: Path
) -> None:
    save_file(tensors, tmp_path / FILE_NAME, metadata={"lora_adapter_metadata": metadata})
    with pytest.raises(ValueError, match=message):
        read_lora(tmp_path)
