"""Decoding with a user's checkout of OccFM, here one that a test writes: same places, same names, a small decoder."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_occfm import CONFIG, save, weights, write_checkout

from mfd_fast.occfm_repo import load_decoder

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _forget_the_checkout() -> Iterator[None]:
    before = list(sys.path)
    yield
    assert sys.path == before
    for name in [name for name in sys.modules if name.partition(".")[0] == "forecast"]:
        del sys.modules[name]


def test_labels_are_the_most_similar_classes(tmp_path: Path) -> None:
    decode = load_decoder(write_checkout(tmp_path / "occfm"), save(tmp_path), 4, CPU)
    latents = torch.randn(7, 4, 3, 2, generator=torch.Generator().manual_seed(1))
    labels = decode(latents)
    assert labels.shape == (7, 6, 4, 5)
    assert labels.dtype == torch.uint8
    w = weights()
    columns = torch.nn.functional.conv_transpose2d(
        latents, w["module.decoder.up.weight"], w["module.decoder.up.bias"], stride=2
    )
    classes = w["module.embedding.class_embeds.weight"]
    for n, x, y, z in ((0, 0, 0, 0), (6, 5, 3, 4), (3, 2, 1, 2)):
        features = columns[n, 3 * z : 3 * z + 3, x, y]
        assert int(labels[n, x, y, z]) == int((classes @ features).argmax())


def test_missing_places_are_named(tmp_path: Path) -> None:
    checkout, checkpoint = write_checkout(tmp_path / "occfm"), save(tmp_path)
    with pytest.raises(NotADirectoryError, match="expected a checkout of OccFM with a folder 'forecast'"):
        load_decoder(tmp_path, checkpoint, 4, CPU)
    with pytest.raises(FileNotFoundError, match=r"no tools/cfgs/.*vae_swin_x5_h16\.yaml, for latents of 5 channels"):
        load_decoder(checkout, checkpoint, 5, CPU)
    with pytest.raises(FileNotFoundError, match=r"there is no file .*nowhere\.ckpt"):
        load_decoder(checkout, tmp_path / "nowhere.ckpt", 4, CPU)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"module.embedding.class_embeds.weight": None}, r"lacks decoder\.\* or embedding\.class_embeds\.weight"),
        ({"module.decoder.up.bias": None}, r"does not fit the decoder SmallUp: .*up\.bias"),
        ({"module.decoder.up.bias": torch.zeros(3)}, r"does not fit the decoder SmallUp: .*size mismatch"),
    ],
)
def test_weights_that_do_not_fit(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        load_decoder(write_checkout(tmp_path / "occfm"), save(tmp_path, **changes), 4, CPU)


def test_what_the_checkout_needs_is_named(tmp_path: Path) -> None:
    checkout = write_checkout(tmp_path / "occfm", decoder="import a_library_that_nobody_has")
    with pytest.raises(ModuleNotFoundError, match="needs a_library_that_nobody_has, which is not installed"):
        load_decoder(checkout, save(tmp_path), 4, CPU)


def test_other_configurations(tmp_path: Path) -> None:
    odd = write_checkout(tmp_path / "odd", config="MODEL: {DECODER: {}}")
    with pytest.raises(ValueError, match="does not describe a compressor: KeyError"):
        load_decoder(odd, save(tmp_path), 4, CPU)
    unknown = write_checkout(tmp_path / "unknown", config=CONFIG.replace("SmallUp", "LargeUp"))
    with pytest.raises(ValueError, match="has no decoder 'LargeUp', it has SmallUp"):
        load_decoder(unknown, save(tmp_path), 4, CPU)


def test_two_checkouts_are_not_mixed(tmp_path: Path) -> None:
    checkpoint = save(tmp_path)
    load_decoder(write_checkout(tmp_path / "one"), checkpoint, 4, CPU)
    load_decoder(tmp_path / "one", checkpoint, 4, CPU)
    with pytest.raises(ValueError, match=r"a package called 'forecast' was imported from .*one"):
        load_decoder(write_checkout(tmp_path / "two"), checkpoint, 4, CPU)


def test_a_malicious_checkpoint_is_refused_unexecuted(tmp_path: Path) -> None:
    class Runs:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "executed"),)

    torch.save({"state_dict": weights(), "more": Runs()}, tmp_path / "bad.ckpt")
    with pytest.raises(ValueError, match=r"was not loaded: it asks for (posix|nt)\.mkdir"):
        load_decoder(write_checkout(tmp_path / "occfm"), tmp_path / "bad.ckpt", 4, CPU)
    assert not (tmp_path / "executed").exists()
