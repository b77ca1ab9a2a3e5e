"""What lies between the matrix multiplications, by the compiled library: as right as torch's, and called only where it can be."""

import pytest
import torch


OPERATIONS = ("rms_norm", "apply_rotary_pos_emb", "swiglu")


@pytest.fixture
def fused(chatglm):
    return chatglm.fused


def arguments(name: str, dtype: torch.dtype, batch: int = 2, length: int = 3, columns: int = 46, one_position=False):
    """Arguments as the network has them; queries and keys are a part of a larger tensor."""
    generator = torch.Generator().manual_seed(columns)

    def random(*shape):
        return 3 * torch.randn(*shape, generator=generator)

    if name == "rms_norm":
        given = (random(batch, length, columns), random(columns))
        return *(tensor.to(dtype) for tensor in given), 1e-5
    if name == "swiglu":
        return (random(batch, length, 2 * columns).to(dtype),)
    heads = random(batch, length, 5 * columns).view(batch, length, 5, columns).transpose(1, 2)
    angles = (random(1 if one_position else batch, length, columns) for _ in range(2))
    return heads[:, :3].to(dtype), *(tensor.to(dtype) for tensor in angles)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns", [2, 16, 46, 1024, 1026])
@pytest.mark.parametrize("name", OPERATIONS)
@torch.no_grad()
def test_against_float64(chatglm, name, columns, dtype):
    operation = getattr(chatglm.modeling, name)
    for shape in ({}, {"batch": 1, "length": 1}, {"length": 1, "one_position": True}):
        given = arguments(name, dtype, columns=columns, **shape)
        exact = operation.__wrapped__(*(g.double() if isinstance(g, torch.Tensor) else g for g in given))
        y = operation(*given)
        error = (y.double() - exact).abs()
        # Rotation adds two products that may cancel.
        size = (
            exact.abs() if name != "apply_rotary_pos_emb" else operation.__wrapped__(*(g.double().abs() for g in given))
        )
        assert y.dtype == dtype and y.shape == exact.shape
        assert (error <= torch.finfo(dtype).eps * exact.abs() + 1e-6 * size + torch.finfo(dtype).smallest_normal).all()


@torch.no_grad()
def test_activation_far_from_zero(chatglm):
    gate = torch.tensor([-1e30, -200.0, -88.0, -20.0, -1e-20, 0.0, 1e-20, 20.0, 88.0, 200.0, 1e30])
    y = chatglm.modeling.swiglu(torch.cat((gate, torch.ones(11)))[None])[0]
    torch.testing.assert_close(y, torch.nn.functional.silu(gate), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", OPERATIONS)
@torch.no_grad()
def test_values_that_are_not_finite(chatglm, name, value, dtype):
    """They must not vanish, nor spoil another row."""
    x, *rest = arguments(name, dtype)
    x[1, ..., 5] = value
    y = getattr(chatglm.modeling, name)(x, *rest)
    assert not y[1].isfinite().all() and y[0].isfinite().all()


@pytest.fixture
def called(chatglm, fused, monkeypatch):
    """Has all operations decided anew; returns the names of those for which the compiled library was called."""
    names = []
    for name in OPERATIONS:
        plain = getattr(chatglm.modeling, name).__wrapped__
        kernel = lambda *given, name=name, plain=plain: (names.append(name), plain(*given))[1]  # noqa: E731
        monkeypatch.setattr(chatglm.modeling, name, fused.fused_on_cpu(kernel)(plain))
    return names


def test_the_network_calls_them(called, small_model):
    model = small_model()
    with torch.no_grad():
        model(torch.tensor([[5, 6, 7]]))
    layers = model.config.num_layers
    assert {name: called.count(name) for name in OPERATIONS} == {
        "rms_norm": 2 * layers + 1,
        "apply_rotary_pos_emb": layers,
        "swiglu": layers,
    }


@pytest.mark.parametrize("name", OPERATIONS)
def test_torch_where_the_compiled_library_cannot(chatglm, fused, called, monkeypatch, name):
    operation, given = getattr(chatglm.modeling, name), arguments(name, torch.float32)
    operation(*given)  # gradients may be wanted
    with torch.no_grad():
        operation(*arguments(name, torch.float64))
        operation(*arguments(name, torch.float32, length=0))
        torch.func.vmap(lambda x: operation(x, *given[1:]))(given[0][None])
        with monkeypatch.context() as patch:
            patch.setattr(fused, "cpu_library", lambda: None)
            operation(*given)
            patch.setattr(fused, "cpu_library", lambda: pytest.fail("There is nothing to compile for other devices."))
            operation(*(g.to("meta") if isinstance(g, torch.Tensor) else g for g in given))
        assert not called
        operation(*given)
    assert called == [name]
