"""Memory and time before there is a GPU: against the arithmetic of ZeRO and measured networks."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from mfd_fast.cli import main
from mfd_fast.estimate import CARDS, GIB, NETWORKS, Plan, estimate, seconds, ways_to_fit
from mfd_fast.models.occfm import TransitionModel

SANA = Plan("sana-1.6b", auxiliary="full", student="lora")
P = NETWORKS["sana-1.6b"].parameters / GIB


@pytest.mark.parametrize(
    ("gpus", "stage", "offload", "bits", "states"),
    [
        (1, 0, False, 32, 27.4),
        *((1, 2, True, 32, 9.5), (1, 2, False, 8, 18.4)),
        *((2, 1, False, 32, 18.4), (2, 2, False, 32, 16.9), (2, 2, True, 32, 8.0), (2, 2, False, 8, 12.5)),
        *((4, 1, False, 32, 14.0), (4, 2, False, 32, 11.7), (8, 2, False, 32, 9.1), (8, 2, False, 8, 8.0)),
    ],
)
def test_states_of_a_full_auxiliary_beside_a_lora_student(
    gpus: int, stage: int, offload: bool, bits: int, states: float
) -> None:
    """Against a table computed by hand: 3.0 (teacher) + 0.5 (student) + the auxiliary's formula."""
    plan = Plan("sana-1.6b", "full", "lora", gpus, 1, "bfloat16", stage, offload, bits)
    # With offload the 12/N bytes move to the host and 2/N of gradients stay.
    assert estimate(plan).states == pytest.approx(states, abs=0.06)


def test_stage_three_has_a_replica_for_rollouts() -> None:
    shared = estimate(Plan("sana-1.6b", "full", "lora", 4, zero_stage=3)).gpu["auxiliary"]
    assert shared == pytest.approx(P * (16 / 4 + 2))
    whole = estimate(Plan("sana-1.6b", "full", "lora", 1, zero_stage=2, offload=True))
    assert whole.host == pytest.approx(P * (12 + 2))


def test_lora_roles_of_sana_fit_small_cards() -> None:
    assert estimate(Plan("sana-1.6b", "lora", "lora")).fits(12)
    four = estimate(Plan("sana-1.6b", "lora", "lora", rows=4))
    assert four.fits(24)
    assert not four.fits(12)


def test_a_full_auxiliary_of_sana_needs_two_cards_or_the_host() -> None:
    one = estimate(SANA)
    assert not one.fits(24)
    assert one.largest == "auxiliary"
    assert next(words for words, _ in ways_to_fit(SANA, 24)) == "--gpus 2 --zero 2"
    two = estimate(Plan("sana-1.6b", "full", "lora", 2, zero_stage=2, checkpointing=True))
    assert two.fits(24)
    assert two.states == pytest.approx(17, abs=0.2)


def test_activations_decide_for_occfm() -> None:
    found = estimate(Plan("occfm", precision="float16"))
    assert found.states < 1
    assert found.largest == "activations"


def test_steps_of_the_student_are_kept_together() -> None:
    two = estimate(Plan("occfm", rows=3, steps=2)).gpu["activations"]
    assert two == pytest.approx(3 * 2 * NETWORKS["occfm"].saved)


@pytest.mark.slow
def test_constants_of_occfm_are_those_of_the_network() -> None:
    """Counted on a forward pass that computes nothing."""
    constants, kept = NETWORKS["occfm"], {}
    with FakeTensorMode(allow_non_fake_inputs=True):
        network = TransitionModel(in_channels=16, trajectory_length=6)
        own = {value.untyped_storage()._cdata for value in (*network.parameters(), *network.buffers())}

        def keep(value: torch.Tensor) -> torch.Tensor:
            storage = value.untyped_storage()
            if storage._cdata not in own:
                kept[storage._cdata] = (storage, storage.nbytes())
            return value

        x, t, trajectory = torch.zeros(1, 12, 16, 50, 50), torch.zeros(1), torch.zeros(1, 12, 2)
        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value),
            torch.autocast("cpu", dtype=torch.bfloat16),
            FlopCounterMode(display=False) as counter,
        ):
            network(x, t, trajectory)
    assert sum(value.numel() for value in network.parameters()) == constants.parameters
    assert counter.get_total_flops() / 1e9 == pytest.approx(constants.gflop, rel=1e-3)
    assert sum(size for _, size in kept.values()) / GIB == pytest.approx(constants.saved, rel=1e-3)


def test_time_is_that_of_the_matrix_products() -> None:
    plan = Plan("occfm", rows=2)
    forward = 2 * 220.5e9 / (0.75 * 71e12)
    least = seconds(plan, CARDS["3090"], evaluations=10, guided=True, student_steps=2)
    assert least == pytest.approx((3 * forward + 2 * forward, 6 * forward, 30 * forward))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"network": "flux"}, "network must be one of sana-1.6b, occfm, got 'flux'"),
        ({"gpus": 0}, "gpus must be at least 1, got 0"),
        ({"offload": True}, "offload needs zero_stage 1, 2 or 3"),
        ({"student": "lora"}, "LoRA roles: not measured for occfm"),
        ({"checkpointing": True}, "checkpointing: not measured for occfm"),
    ],
)
def test_what_cannot_be_estimated_is_refused(values: dict[str, object], words: str) -> None:
    arguments: dict[str, object] = {"network": "occfm"} | values
    with pytest.raises(ValueError, match=words):
        Plan(**arguments)  # type: ignore[arg-type]


def test_the_command_says_what_decides(capsys: pytest.CaptureFixture[str]) -> None:
    sana = ["estimate", "--network", "sana-1.6b", "--auxiliary", "full", "--student", "lora"]
    assert main(sana) == 1
    said = capsys.readouterr().out
    assert "does not fit: 31.7 of 24 GiB; the largest term is auxiliary" in said
    assert "with --gpus 2 --zero 2 it would" in said
    assert main([*sana, "--gpus", "2", "--zero", "2", "--checkpointing"]) == 0
    assert "of it 16.95 for weights" in capsys.readouterr().out
    assert main(["estimate", "--preset", "occfm-8x3090", "--gpus", "8"]) == 0
    said = capsys.readouterr().out
    assert "the largest term is activations" in said
    assert "of 1 rows" in said
    assert main(["estimate", "--preset", "occfm-8x3090", "--gpus", "3"]) == 2
    assert "a multiple of gpus x accumulation = 3 x 1, got 8" in capsys.readouterr().err
    assert main(["estimate", "--preset", "sana-1600m-24gb"]) == 0
    assert "activations    0.30" in capsys.readouterr().out, "its blocks and steps are computed again"
    assert main(["estimate", "--preset", "mixture-2d"]) == 2
    assert "'mlp' was not measured" in capsys.readouterr().err
