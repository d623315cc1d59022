import pytest

from valora_jax.models.llava15.names import LAYOUTS, canonical, layout_of, written

# One tensor of every part, canonical first, then as each layout writes it.
SPELLINGS = {
    "model.language_model.layers.3.self_attn.q_proj.weight": {
        "hub": "language_model.model.layers.3.self_attn.q_proj.weight",
        "saved": "language_model.model.layers.3.self_attn.q_proj.weight",
        "in_memory_4": "model.language_model.layers.3.self_attn.q_proj.weight",
    },
    "lm_head.weight": {
        "hub": "language_model.lm_head.weight",
        "saved": "language_model.lm_head.weight",
        "in_memory_4": "lm_head.weight",
    },
    "model.multi_modal_projector.linear_1.bias": {
        "hub": "multi_modal_projector.linear_1.bias",
        "saved": "multi_modal_projector.linear_1.bias",
        "in_memory_4": "model.multi_modal_projector.linear_1.bias",
    },
    "model.vision_tower.encoder.layers.0.mlp.fc1.weight": {
        "hub": "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight",
        "saved": "vision_tower.encoder.layers.0.mlp.fc1.weight",
        "in_memory_4": "model.vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight",
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_maps_to_canonical_and_back(layout):
    for name, spellings in SPELLINGS.items():
        stored = spellings.get(layout, name)
        assert canonical(stored) == name
        assert written(name, layout) == stored


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_is_recognised_by_its_names(layout):
    assert layout_of(written(name, layout) for name in SPELLINGS) == layout


def test_a_mixture_of_layouts_is_none():
    with pytest.raises(ValueError, match="follow no single layout"):
        layout_of(["lm_head.weight", "multi_modal_projector.linear_1.bias"])


def test_module_paths_of_old_adapters_are_mapped_too():
    path = "language_model.model.layers.1.mlp.down_proj"
    assert canonical(path) == "model.language_model.layers.1.mlp.down_proj"
    assert canonical("language_model.lm_head") == "lm_head"


@pytest.mark.parametrize("name", ["visual.blocks.0.norm1.weight", "lm_headless", "model.norm"])
def test_a_foreign_name_stays_as_it_is(name):
    assert canonical(name) == name
    with pytest.raises(ValueError, match="is not a canonical name"):
        written(name, "hub")
