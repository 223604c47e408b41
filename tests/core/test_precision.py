"""Models in bfloat16 with float32 normalization layers, and export of float32 weights."""

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_dualadam import DualAdam
from hf_dualadam.precision import master_state_dict, to_bfloat16


def _llama(**settings):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=80, num_key_value_heads=2, **sizes, **settings))


def _loss(model, step=0):
    tokens = torch.randint(0, 80, (2, 9), generator=torch.Generator().manual_seed(step))
    return model(input_ids=tokens, labels=tokens).loss


@pytest.mark.parametrize("autocast", [False, True])
def test_all_but_the_norms_become_bfloat16_and_the_model_works(autocast):
    model, wide = _llama(), _llama()
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    assert to_bfloat16(model) is model
    for name, p in model.named_parameters():
        assert p.dtype == (torch.float32 if "norm" in name else torch.bfloat16), name
    for name, b in model.named_buffers():
        assert b.dtype == buffers[name].dtype and torch.equal(b, buffers[name])
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = _loss(model)
        torch.testing.assert_close(loss.float(), _loss(wide).float(), rtol=0.01, atol=0)
    loss.backward()
    assert {p.grad.dtype == p.dtype for p in model.parameters()} == {True}
    if not autocast:
        assert model.model(torch.tensor([[1, 2]])).last_hidden_state.dtype == torch.bfloat16


def test_norms_of_torch_and_tied_weights():
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3),
        torch.nn.BatchNorm2d(4),
        torch.nn.Flatten(),
        torch.nn.Linear(16, 5),
        torch.nn.LayerNorm(5),
    )
    to_bfloat16(model)
    assert model(torch.randn(2, 3, 4, 4).bfloat16()).dtype == torch.bfloat16
    assert model[1].running_mean.dtype == model[1].weight.dtype == model[4].weight.dtype == torch.float32
    tied = to_bfloat16(_llama(tie_word_embeddings=True))
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert tied.lm_head.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("tied", [False, True])
def test_exported_weights_are_those_that_were_trained(tmp_path, tied):
    model = to_bfloat16(_llama(tie_word_embeddings=tied))
    optimizer = DualAdam(model.parameters(), 1e-3, state_bits=8, master_weight_bits=24)
    for step in range(3):
        _loss(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    state = master_state_dict(model, optimizer)
    assert state.keys() == model.state_dict().keys()
    model.save_pretrained(tmp_path, state_dict=state)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    corrected = 0
    for (name, p), q in zip(model.named_parameters(), loaded.parameters()):
        assert torch.equal(optimizer.master_weights(p), q), name
        assert (p.float() - q).abs().max() <= 2**-8 * q.abs().max()
        corrected += int((p != q).sum())
    assert corrected > 1000
    model.save_pretrained(tmp_path / "half")
    half = LlamaForCausalLM.from_pretrained(tmp_path / "half", dtype=torch.bfloat16)
    assert torch.equal(half.lm_head.weight, model.lm_head.weight)


def test_export_refuses_other_optimizers_and_changes_nothing():
    model = to_bfloat16(_llama())
    with pytest.raises(TypeError, match="AdamW"):
        master_state_dict(model, torch.optim.AdamW(model.parameters()))
    before = copy.deepcopy(model.state_dict())
    state = master_state_dict(model, DualAdam(model.parameters()))
    assert all(torch.equal(before[k].float(), state[k]) for k in before)
    assert all(v.dtype == before[k].dtype for k, v in model.state_dict().items())
