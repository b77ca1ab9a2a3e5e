"""Configuration: the published format, the names that others use, and values that are refused."""

import json

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from conftest import ROOT


PUBLISHED_DEFAULTS = dict(
    num_layers=28,
    padded_vocab_size=65024,
    hidden_size=4096,
    ffn_hidden_size=13696,
    kv_channels=128,
    num_attention_heads=32,
    seq_length=2048,
    hidden_dropout=0.0,
    classifier_dropout=None,
    attention_dropout=0.0,
    layernorm_epsilon=1e-5,
    rmsnorm=True,
    apply_residual_connection_post_layernorm=False,
    post_layer_norm=True,
    add_bias_linear=False,
    add_qkv_bias=False,
    bias_dropout_fusion=True,
    multi_query_attention=False,
    multi_query_group_num=1,
    apply_query_key_layer_scaling=True,
    attention_softmax_in_fp32=True,
    fp32_residual_connection=False,
    quantization_bit=0,
    pre_seq_len=None,
    prefix_projection=False,
)
# What other programs read from config.json: vLLM, SGLang, llama.cpp, chatglm.cpp, TensorRT-LLM
READ_BY_OTHERS = """
    num_layers padded_vocab_size hidden_size ffn_hidden_size kv_channels num_attention_heads seq_length rmsnorm
    post_layer_norm add_bias_linear add_qkv_bias multi_query_attention multi_query_group_num layernorm_epsilon
    apply_residual_connection_post_layernorm tie_word_embeddings original_rope rope_ratio architectures _name_or_path
    eos_token_id pad_token_id model_type
""".split()


def test_defaults_are_the_published(chatglm):
    config = chatglm.ChatGLMConfig()
    assert {name: getattr(config, name) for name in PUBLISHED_DEFAULTS} == PUBLISHED_DEFAULTS
    assert config.vocab_size == 65024
    assert (config.eos_token_id, config.pad_token_id, config.use_cache) == (2, 0, True)


def test_config_json_is_the_published(shared):
    published = json.loads((shared / "golden/hub_metadata/chatglm2-6b/config.json").read_text())
    ours = json.loads((ROOT / "config.json").read_text())
    assert {**ours, **published, "auto_map": {**ours["auto_map"], **published["auto_map"]}} == ours


def test_standard_names(chatglm):
    config = chatglm.ChatGLMConfig.from_pretrained(ROOT)
    standard = dict(
        num_hidden_layers=28,
        vocab_size=65024,
        intermediate_size=13696,
        head_dim=128,
        max_position_embeddings=32768,
        rms_norm_eps=1e-5,
        num_key_value_heads=2,
    )
    assert {name: getattr(config, name) for name in standard} == standard
    assert config.to_dict()["num_key_value_heads"] == 2
    assert chatglm.ChatGLMConfig(num_hidden_layers=3, intermediate_size=5).num_layers == 3
    assert chatglm.ChatGLMConfig().num_key_value_heads == 32
    config = chatglm.ChatGLMConfig(num_key_value_heads=4)
    assert (config.multi_query_attention, config.multi_query_group_num) == (True, 4)


def test_round_trip(chatglm, tmp_path):
    config = chatglm.ChatGLMConfig.from_pretrained(ROOT, rope_ratio=2, pre_seq_len=7)
    config.architectures = ["ChatGLMForConditionalGeneration"]
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert not [name for name in READ_BY_OTHERS if name not in saved]
    assert saved["architectures"] == ["ChatGLMModel"]
    assert saved["_name_or_path"] == "THUDM/chatglm2-6b"
    again = chatglm.ChatGLMConfig.from_pretrained(tmp_path)
    assert again.to_dict() == {**config.to_dict(), "architectures": ["ChatGLMModel"]}
    changed = chatglm.ChatGLMConfig.from_pretrained(tmp_path, multi_query_group_num=4, kv_channels=64, rope_ratio=3)
    assert (changed.num_key_value_heads, changed.head_dim) == (4, 64)
    assert changed.rope_ratio == 3


def test_rope(chatglm):
    plain = chatglm.ChatGLMConfig().rope_parameters
    assert plain == {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    given = chatglm.ChatGLMConfig(rope_parameters={"rope_type": "default", "rope_theta": 40000.0})
    assert given.rope_parameters == {**plain, "rope_theta": 40000.0}
    legacy = chatglm.ChatGLMConfig(rope_scaling={"rope_type": "dynamic", "factor": 2.0})
    assert legacy.rope_parameters["rope_type"] == "dynamic"


def test_rope_scaling_is_none_without_scaling(chatglm):
    """FastChat multiplies the context by rope_scaling["factor"] if there is a rope_scaling."""
    config = chatglm.ChatGLMConfig()
    plain = config.rope_parameters
    assert config.rope_scaling is None
    config.rope_scaling = {"type": "dynamic", "factor": 2.0}
    assert config.rope_scaling == {**plain, "type": "dynamic", "rope_type": "dynamic", "factor": 2.0}
    assert config.context_length == 2 * config.seq_length
    config.rope_scaling = None
    assert config.rope_scaling is None and config.rope_parameters == plain


def test_context_extended_beyond_the_checkpoint(chatglm):
    """YaRN keeps what the checkpoint was trained with apart from what is asked for."""
    yarn = {"rope_type": "yarn", "factor": 2.0}
    config = chatglm.ChatGLMConfig.from_pretrained(ROOT, seq_length=65536, rope_parameters=yarn)
    assert config.rope_parameters["original_max_position_embeddings"] == 32768
    assert "original_max_position_embeddings" not in yarn


def test_rebuilt_from_its_dict(chatglm):
    values = chatglm.ChatGLMConfig(num_attention_heads=4).to_dict()
    config = chatglm.ChatGLMConfig(**{**values, "num_attention_heads": 8})
    assert (config.multi_query_attention, config.num_key_value_heads) == (False, 8)


def test_quantization_bit(chatglm):
    assert not hasattr(chatglm.ChatGLMConfig(), "quantization_config")
    config = chatglm.ChatGLMConfig(quantization_bit=4)
    assert config.quantization_config == {"quant_method": "chatglm", "bits": 4}
    with pytest.raises((ValueError, StrictDataclassError), match="quantization_config lacks 'bits'"):
        chatglm.ChatGLMConfig(quantization_config={"quant_method": "chatglm", "group_size": 32})


@pytest.mark.parametrize(
    "values",
    [
        dict(multi_query_attention=True, multi_query_group_num=3),
        dict(kv_channels=5),
        dict(kv_channels=0),
        dict(num_layers=0),
        dict(num_attention_heads=-1),
        dict(seq_length=0),
        dict(hidden_size=-4),
        dict(hidden_dropout=1.5),
        dict(ffn_hidden_size=0),
        dict(layernorm_epsilon=0.0),
        dict(layernorm_epsilon=float("inf")),
        dict(rope_parameters={"rope_type": "foo"}),
        dict(rope_parameters={"rope_type": "linear", "factor": 0.0}),
        dict(rope_parameters={"rope_type": "default", "rope_theta": -1.0}),
        dict(multi_query_attention=True, multi_query_group_num=2, num_key_value_heads=4),
        dict(kv_channels=16, head_dim=8),
        dict(rope_ratio=0),
        dict(rope_parameters={"rope_type": "linear", "factor": 2.0}, rope_ratio=4),
        dict(num_layers=1_000_000),
        dict(initializer_range=-1.0),
        dict(quantization_config=[1]),
        dict(quantization_bit=3),
        dict(pre_seq_len=0),
        dict(original_rope=False),
        dict(position_encoding_2d=True),
        dict(inner_hidden_size=16384),
        dict(hidden_act="gelu"),
        dict(sliding_window=4096),
    ],
    ids=str,
)
def test_refused(chatglm, values):
    with pytest.raises((ValueError, StrictDataclassError), match=list(values)[-1]):
        chatglm.ChatGLMConfig(**values)


def test_wrong_type_is_refused(chatglm):
    with pytest.raises(Exception, match="seq_length"):
        chatglm.ChatGLMConfig(seq_length="long")


def test_overrides_are_checked(chatglm):
    with pytest.raises(StrictDataclassError, match="kv_channels"):
        chatglm.ChatGLMConfig.from_pretrained(ROOT, kv_channels=3)


def test_auto_config():
    config = AutoConfig.from_pretrained(ROOT, trust_remote_code=True, pre_seq_len=128, prefix_projection=True)
    assert (type(config).__name__, config.pre_seq_len, config.prefix_projection) == ("ChatGLMConfig", 128, True)
