"""``mfd-fast estimate`` from the command line."""

import json
from collections.abc import Callable

import pytest


def test_sana_on_a_small_and_a_large_gpu(cli: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = cli("estimate", "--preset", "sana-1600m", "--gpu-memory", "12")
    assert code == 0
    assert "1,604,462,752 parameters, 34,406,400 in each adapter" in out
    assert "\nfits in 12 GiB" in out
    code, out, _ = cli("estimate", "--preset", "sana-1600m", "--gpu-memory", "12", "--checkpointing", "none")
    assert code == 1
    assert "distill.recompute_steps = true" in out
    code, out, _ = cli("estimate", "--preset", "sana-1600m-24gb")
    assert code == 0
    assert "4 row(s) in a backward pass" in out
    assert out.startswith("on 1 RTX 3090 (others: --gpu):\n")
    assert out.endswith("all 3,000 student updates: 19.4 h by that model\n")
    assert "\nfits in 24 GiB" in out
    assert "\nfits in 96 GiB" in cli("estimate", "--preset", "sana-1600m-96gb", "--gpu", "rtx-pro-6000")[1]


def test_sana_with_a_full_auxiliary(cli: Callable[..., tuple[int, str, str]]) -> None:
    full = ("estimate", "--model", "sana-1600m", "--auxiliary", "full", "--checkpointing")
    code, out, _ = cli(*full)
    assert code == 1
    assert "does not fit in 24 GiB" in out
    assert "cheapest knobs" in out
    assert cli(*full, "--gpus", "2", "--zero", "2", "--batch-size", "1")[0] == 0
    code, out, _ = cli(*full, "--offload", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["fits"]
    assert found["host"] == 18 * 1_604_462_752
    assert found["total"] == pytest.approx(sum(term["bytes"] for term in found["terms"]))


def test_where_sharing_brings_nothing_it_is_said(cli: Callable[..., tuple[int, str, str]]) -> None:
    lora = ("estimate", "--preset", "sana-1600m-24gb", "--gpus", "2")
    for more in (("--zero", "2"), ("--offload",)):
        found = json.loads(cli(*lora, *more, "--json")[1])
        assert found["sharing"].startswith("ZeRO brings nothing: it shares out whole networks")
        assert found["total"] == json.loads(cli(*lora, "--json")[1])["total"]
        assert "\nZeRO brings nothing" in cli(*lora, *more)[1]
    full = ("estimate", "--preset", "sana-1600m", "--auxiliary", "full", "--checkpointing", "--batch-size", "1")
    assert json.loads(cli(*full, "--gpus", "2", "--zero", "2", "--json")[1])["sharing"] is None
    assert "\nZeRO-3 brings little: without it 31.13 GiB are needed" in cli(*full, "--zero", "3")[1]


@pytest.mark.slow
def test_occfm_is_about_activations(cli: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = cli("estimate", "--preset", "occfm-8x3090", "--gpus", "8", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["states"] < 2**30 < found["activations"]
    assert found["dominating"]["what"] == "activations"
    assert found["parameters"] == 11_508_880


def test_a_preset_of_small_networks(cli: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = cli("estimate", "--preset", "digits-dit", "--gpu", "h200", "--student", "lora")
    assert code == 0
    assert "fits in 139 GiB" in out
    assert "not a measurement" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--gpus", "0"), "--gpus must be above 0"),
        (("--batch-size", "-1"), "--batch-size must be above 0"),
        (("--offload", "--zero", "0"), "--offload needs --zero"),
        (("--preset", "sanna"), "sanna"),
        (("--preset", "occfm-8x3090", "--gpus", "3"), "multiple of gpus x accumulation = 3 x 1, got 8"),
        (("--settings", "nowhere.toml"), "there is no file nowhere.toml"),
        (("--set", "distill.method=cd", "--auxiliary", "full"), "this method has none"),
    ],
)
def test_wrong_input(refused: Callable[..., str], arguments: tuple[str, ...], words: str) -> None:
    assert words in refused("estimate", *arguments)
