"""Encoded prompts: the embeddings of diffusers' own pipeline, read row by row, written once and only once."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mfd_fast.data import load_dataset
from mfd_fast.data.dataset import all_rows
from mfd_fast.data.prompt_file import read_prompts
from mfd_fast.data.prompt_store import INDEX, PromptStore, pack, pad, read_index, write_shard
from mfd_fast.data.prompts import PLAN, PromptEncoder, encode_prompts, latent_shape
from mfd_fast.data.verify import damaged_files
from mfd_fast.storage import write_json

pytest.importorskip("diffusers")
TEXTS = ["a red cat", "the moon", "a photo of a bear on the moon", "rain", "an old cat riding a skateboard"]


@pytest.fixture(scope="module")
def encoder(sana_pipeline: Path) -> PromptEncoder:
    return PromptEncoder(sana_pipeline, dtype=torch.float32, max_tokens=12)


@pytest.fixture
def encode(encoder: PromptEncoder, tmp_path: Path) -> Callable[..., Any]:
    """Encodes the texts into a folder."""

    def run(texts: list[str] = TEXTS, by: PromptEncoder = encoder, **options: Any) -> Path:
        file = tmp_path / "prompts.txt"
        file.write_text("\n".join(texts))
        out = tmp_path / "encoded"
        chosen = {"sample_shape": (4, 4, 4), "batch_size": 2, "shard_rows": 2, **options}
        encode_prompts(file, read_prompts(file), by, out, **chosen)
        return out

    return run


def test_progress_is_told_for_every_call_of_the_encoder(encode: Callable[..., Path]) -> None:
    told: list[int] = []
    encode(batch_size=2, shard_rows=3, progress=told.append)
    assert told == [2, 1, 2]
    encode(batch_size=2, shard_rows=3, progress=told.append)
    assert told[3:] == [3, 2]  # whole files that were there


def test_rows_are_what_the_pipeline_gives(encode: Callable[..., Path], sana_pipeline: Path) -> None:
    from diffusers import SanaPipeline

    store = PromptStore(encode())
    pipeline = SanaPipeline.from_pretrained(sana_pipeline, transformer=None, vae=None)
    embeds, mask, negative, negative_mask = pipeline.encode_prompt(
        TEXTS, negative_prompt="", device="cpu", max_sequence_length=12
    )
    for row in range(len(TEXTS)):
        ours, marks = store.row(row)
        length = int(mask[row].sum())
        assert bool(marks.all())
        torch.testing.assert_close(ours, embeds[row, :length], atol=1e-6, rtol=1e-5)
    padded = store.negative()
    used = int(negative_mask[0].sum())
    assert padded["prompt_embeds"].shape == (1, store.index.longest, 16)
    assert padded["prompt_mask"].sum() == used
    torch.testing.assert_close(padded["prompt_embeds"][0, :used], negative[0, :used], atol=1e-6, rtol=1e-5)


def test_an_instruction_goes_before_prompts_only(sana_pipeline: Path, encoder: PromptEncoder) -> None:
    told = PromptEncoder(sana_pipeline, dtype=torch.float32, max_tokens=12, instruction="photo of ")
    plain, _ = encoder.encode(["a red cat"])
    changed, _ = told.encode(["a red cat"])
    assert not torch.allclose(plain[:, 1:4], changed[:, 1:4])
    assert torch.equal(encoder.encode([""], negative=True)[0], told.encode([""], negative=True)[0])


def test_the_data_set(encode: Callable[..., Path]) -> None:
    out = encode()
    data = load_dataset("prompts", out, held_out=2)
    assert data.sample_shape == (4, 4, 4)
    assert len(data.x) == 3
    assert len(data.held_out_x) == 2
    parts = (data.conditions, data.held_out_conditions)
    everything = {name: torch.cat([all_rows(part[name]) for part in parts]) for name in data.conditions}
    store = PromptStore(out)
    expected = pad([store.row(row) for row in range(5)], store.index.longest)
    assert all(torch.equal(everything[name], expected[name]) for name in expected)
    index = torch.tensor([2, 0, 2])
    assert torch.equal(data.conditions["prompt_mask"][index], expected["prompt_mask"][index])
    assert data.negative_condition is not None
    assert data.negative_condition["prompt_mask"].shape == (1, store.index.longest)
    with pytest.raises(ValueError, match="conditions without samples"):
        data.x[torch.tensor([0])]
    assert load_dataset("prompts", out, latents=[2, 3, 3]).sample_shape == (2, 3, 3)


def test_only_the_shard_of_a_row_is_opened(encode: Callable[..., Path]) -> None:
    out = encode()
    (out / "shard-00000.safetensors").unlink()
    store = PromptStore(out)
    assert len(store.row(4)[0])
    with pytest.raises(ValueError, match=r"shard-00000.safetensors is missing"):
        store.row(0)


def test_another_start_goes_on_where_it_stopped(encode: Callable[..., Path], encoder: PromptEncoder, tmp_path: Path,
                                                monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    original, calls = encoder.encode, []

    def stops(texts: list[str], **options: Any) -> tuple[Tensor, Tensor]:
        if "rain" in texts and not calls.count("again"):
            raise KeyboardInterrupt
        calls.append(texts)
        return original(texts, **options)

    monkeypatch.setattr(encoder, "encode", stops)
    with pytest.raises(KeyboardInterrupt):
        encode()
    out = tmp_path / "encoded"
    assert sorted(path.name for path in out.iterdir()) == [PLAN, "shard-00000.safetensors"]
    with pytest.raises(FileNotFoundError, match="holds no encoded prompts"):
        PromptStore(out)
    calls[:] = ["again"]
    seen: list[int] = []
    encode(progress=seen.append)
    assert TEXTS[:2] not in calls
    assert seen == [2, 2, 1]
    store = PromptStore(out)
    assert not damaged_files(store.digests)
    assert store.index.prompts == 5
    torch.testing.assert_close(store.row(0)[0], original(["a red cat"])[0][0, : len(store.row(0)[0])])


def test_a_folder_belongs_to_one_file_and_one_encoder(encode: Callable[..., Path], sana_pipeline: Path) -> None:
    out = encode()
    with pytest.raises(ValueError, match="holds other prompts"):
        encode(TEXTS[:3])
    with pytest.raises(ValueError, match=r"begun in another way \(shard_rows was 2, is 3\)"):
        encode(shard_rows=3)
    with pytest.raises(ValueError, match=r"\(dtype was 'float32', is 'bfloat16'\)"):
        encode(by=PromptEncoder(sana_pipeline, max_tokens=12))
    (out / PLAN).unlink()
    with pytest.raises(ValueError, match="holds files but no encoded prompts"):
        encode()


def test_padding_inside_is_kept_and_at_the_end_is_not() -> None:
    embeds = torch.arange(24.0).reshape(2, 4, 3)
    packed = pack(embeds, torch.tensor([[1, 0, 1, 0], [1, 0, 0, 0]]))
    assert packed["ends"].tolist() == [3, 4]
    assert packed["mask"].tolist() == [1, 0, 1, 1]
    assert torch.equal(packed["embeds"], torch.cat([embeds[0, :3], embeds[1, :1]]))
    with pytest.raises(ValueError, match="prompt 1 has no token"):
        pack(embeds, torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0]]))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": 2}, "format 2, this version reads 1"),
        ({"prompts": 4}, "rows do not add up"),
        ({"width": 0}, "width must be a whole number above 0"),
        ({"negative": {"file": "../a", "rows": 1, "sha256": ""}}, "a shard must be a plain name"),
        ({"shards": [3]}, "not an index"),
        ({"sample_shape": ["a"]}, "sample_shape must be"),
    ],
)
def test_damaged_indices_are_refused(encode: Callable[..., Path], change: dict[str, Any], words: str) -> None:
    path = encode() / INDEX
    write_json(path, json.loads(path.read_text()) | change)
    with pytest.raises(ValueError, match=words):
        read_index(path)


def test_files_that_vanish_are_named_when_they_are_needed(encode: Callable[..., Path]) -> None:
    out = encode()
    store = PromptStore(out)
    before = store.row(0)[0].clone()
    for path in out.glob("shard-*"):
        path.unlink()
    assert torch.equal(store.row(0)[0], before)
    with pytest.raises(ValueError, match=r"shard-00002\.safetensors is missing"):
        store.row(store.index.prompts - 1)


def test_damaged_shards_are_refused(encode: Callable[..., Path]) -> None:
    out = encode()
    tensors = {"embeds": torch.zeros(3, 16), "mask": torch.ones(3, dtype=torch.uint8), "ends": torch.tensor([2, 1])}
    write_shard(out, "shard-00000.safetensors", tensors)
    with pytest.raises(ValueError, match="the ends of its rows are damaged"):
        PromptStore(out).row(0)
    write_shard(out, "shard-00000.safetensors", tensors | {"ends": torch.tensor([1, 2])})
    with pytest.raises(ValueError, match=r"\[3, 16\] embeddings"):
        PromptStore(out).row(0)
    (out / "shard-00000.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="not a shard"):
        PromptStore(out).row(0)


def test_latent_shape_and_lacking_parts(sana_pipeline: Path, tmp_path: Path) -> None:
    assert latent_shape(sana_pipeline) == (4, 4, 4)
    assert latent_shape(tmp_path) is None
    with pytest.raises(FileNotFoundError, match="no tokenizer, text_encoder"):
        PromptEncoder(tmp_path)


def test_one_prompt_is_too_few(encode: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one prompt to train on"):
        load_dataset("prompts", encode(TEXTS[:1]))
