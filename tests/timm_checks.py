"""What timm asks of its own models, asked of an exported one: each check takes the name of a registered entry point."""

import timm
import torch
from timm.models._features_fx import get_notrace_functions, get_notrace_modules
from timm.models._registry import get_pretrained_cfg
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names


def image(name, batch=2):
    return torch.randn(batch, *get_pretrained_cfg(name).input_size)


def forward_and_checkpointing(name):
    torch.manual_seed(0)
    model, x = timm.create_model(name).eval(), image(name)
    y = model(x)
    assert y.shape == (2, get_pretrained_cfg(name).num_classes) and y.isfinite().all()
    assert not model.training
    try:
        model.set_grad_checkpointing()
    except AssertionError:  # timm's way to say that this network does not have it
        return
    assert torch.allclose(model(x), y, rtol=1e-4, atol=1e-5)


def backward(name):
    model = timm.create_model(name, num_classes=42).train()
    y = model(image(name))
    y.mean().backward()
    assert y.shape == (2, 42) and y.isfinite().all()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


def default_cfg(name):
    model, x = timm.create_model(name).eval(), image(name)
    cfg, state = model.pretrained_cfg, model.state_dict()
    for key in ("first_conv", "classifier"):
        for layer in [cfg[key]] if isinstance(cfg[key], str) else cfg[key]:
            assert f"{layer}.weight" in state, (key, layer)
    last = model.forward_features(x)
    channels_first = getattr(model, "output_fmt", "NCHW") == "NCHW"
    assert last.shape[1 if channels_first else -1] == model.num_features
    size = tuple(last.shape[2:] if channels_first else last.shape[1:3])
    assert size == tuple(cfg["pool_size"])
    assert model.forward_head(last, pre_logits=True).shape[1] == model.head_hidden_size
    fresh = timm.create_model(name, num_classes=0).eval()
    model.reset_classifier(0)
    for headless in (model, fresh):
        assert headless(x).ndim == 2 and headless(x).shape[1] in (model.num_features, model.head_hidden_size)
    model.reset_classifier(7)
    y = model.train()(x)
    y.sum().backward()
    assert y.shape == (2, 7)
    model.eval().reset_classifier(0, "")
    for unpooled in (model, timm.create_model(name, num_classes=0, global_pool="").eval()):
        y = unpooled(x)
        assert y.ndim == 4 and tuple(y.shape[2:] if channels_first else y.shape[1:3]) == size


def script(name):
    model, x = timm.create_model(name).eval(), image(name)
    assert torch.allclose(torch.jit.script(model)(x), model(x), rtol=1e-4, atol=1e-5)


def _levels_are_as_told(levels, info, side, channels_first=True):
    assert len(levels) == len(info.channels()) >= 3
    for level, channels, reduction in zip(levels, info.channels(), info.reduction(), strict=True):
        if not channels_first:
            level = level.movedim(-1, 1)
        assert level.shape[1] == channels
        assert abs(level.shape[2] - side / reduction) < 1.01, (level.shape, reduction)


def features(name, **how):
    x = image(name)
    model = timm.create_model(name, features_only=True, **how).eval()
    channels_first = getattr(model, "output_fmt", "NCHW") == "NCHW"
    _levels_are_as_told(model(x), model.feature_info, x.shape[-1], channels_first)


def getter_features(name):
    features(name, feature_cls="getter")


def intermediates(name):
    model, x = timm.create_model(name).eval(), image(name)
    last, levels = model.forward_intermediates(x)
    assert torch.allclose(last, model.forward_features(x), rtol=1e-4, atol=1e-5)
    _levels_are_as_told(levels, timm.models.FeatureInfo(model.feature_info, range(len(levels))), x.shape[-1])


def _graph(model):
    how = {"leaf_modules": get_notrace_modules(), "autowrap_functions": get_notrace_functions()}
    train, evaluate = get_graph_node_names(model, tracer_kwargs=how)
    return create_feature_extractor(
        model, train_return_nodes=[train[-1]], eval_return_nodes=[evaluate[-1]], tracer_kwargs=how
    )


def fx_forward(name):
    model, x = timm.create_model(name).eval(), image(name)
    (y,) = _graph(model).eval()(x).values()
    assert torch.equal(y, model(x))


def fx_backward(name):
    model = timm.create_model(name, num_classes=42)
    graph = _graph(model).train()
    (y,) = graph(image(name)).values()
    y.mean().backward()
    assert y.shape == (2, 42)
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


CHECKS = (
    *(forward_and_checkpointing, backward, default_cfg, script, features, getter_features, intermediates),
    *(fx_forward, fx_backward),
)
