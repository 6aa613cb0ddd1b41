import copy
import math

import numpy as np
import pytest
import torch
from conftest import tiny_batch, tiny_config, tiny_processor
from MMCLIP.modeling_mmclip import (
    MMCLIPForImageClassification,
    MMCLIPForPreTraining,
    MMCLIPModel,
    contrastive_loss,
    finding_loss,
    fold_patch_convolution,
    hide_pixels,
    label_likeness,
    local_prompt_logits,
    masked_patch_loss,
    masked_token_loss,
    normalise_patches,
    patchify,
    prompt_directions,
    prompt_logits,
    select_masked_patches,
)
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModel,
    BertConfig,
    BertModel,
    BertTokenizerFast,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
    ViTConfig,
    ViTModel,
)


ONE = torch.tensor(1.0)


# ------------------------------------------------------------------------------------------------ losses and masking


def test_contrastive_loss_of_two_orthogonal_pairs_is_log_of_one_plus_exp_of_minus_the_scale():
    embeds = torch.eye(2)  # cosine 1 with the own text, 0 with the other
    assert contrastive_loss(embeds, embeds, torch.tensor(3.0)).item() == pytest.approx(math.log1p(math.exp(-3)))


def test_contrastive_loss_equals_cross_entropy_over_the_diagonal_when_no_text_repeats():
    images, texts = torch.nn.functional.normalize(torch.randn(2, 5, 8), dim=-1)
    logits = 7.0 * images @ texts.T
    target = torch.arange(5)
    cross_entropy = torch.nn.functional.cross_entropy
    expected = (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2
    torch.testing.assert_close(contrastive_loss(images, texts, torch.tensor(7.0), torch.arange(5)), expected)


def test_rows_with_the_same_text_are_mutual_positives():
    # all similarities equal: with one group every column is a positive, so the loss is the entropy
    images, texts = torch.ones(2, 1), torch.ones(2, 1)
    assert contrastive_loss(images, texts, ONE, torch.tensor([7, 7])).item() == pytest.approx(math.log(2))
    # a perfect split into the two groups {0, 1} and {2} costs log 2 for the first two rows and 0 for the third
    embeds = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    loss = contrastive_loss(embeds, embeds, torch.tensor(100.0), torch.tensor([1, 1, 2]))
    assert loss.item() == pytest.approx(2 / 3 * math.log(2), abs=1e-6)


def test_a_text_without_image_is_a_negative_for_images_and_nothing_else():
    embeds = torch.eye(3)
    has_image = torch.tensor([True, True, False])
    loss = contrastive_loss(embeds, embeds, ONE, None, has_image)
    image_to_text = math.log(math.e + 2) - 1  # three texts
    text_to_image = math.log(math.e + 1) - 1  # two images
    assert loss.item() == pytest.approx((image_to_text + text_to_image) / 2)


def test_soft_targets_are_the_likeness_of_labels():
    labels = torch.tensor([[1.0, 1.0, 0.0], [1.0, -100.0, 0.0], [0.0, 0.0, -100.0], [0.0, 0.0, 0.0]])
    half = math.exp(math.sqrt(0.5))  # one of two findings is shared
    expected = torch.tensor(
        [[math.e, half, 1, 1], [half, math.e, 1, 1], [1, 1, math.e, math.e], [1, 1, math.e, math.e]]
    )
    torch.testing.assert_close(label_likeness(labels, labels, 1.0), expected)
    torch.testing.assert_close(label_likeness(labels, labels, 0.5), expected**2)
    embeds, scale = torch.eye(4), torch.tensor(3.0)
    targets = expected / expected.sum(dim=1, keepdim=True)
    loss = contrastive_loss(embeds, embeds, scale, labels=labels)
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(scale * embeds, targets))


def test_the_sigmoid_loss_tells_each_pair_by_itself():
    embeds = torch.eye(2)
    loss = contrastive_loss(embeds, embeds, torch.tensor(3.0), logit_bias=torch.tensor(-1.0))
    assert loss.item() == pytest.approx(math.log1p(math.exp(-2)) + math.log1p(math.exp(-1)))  # own at 2, other at -1
    # rows of one group are positives of each other, a row without an image is a negative alone
    same = contrastive_loss(embeds, embeds, torch.tensor(3.0), torch.zeros(2), logit_bias=torch.tensor(-1.0))
    assert same.item() == pytest.approx(math.log1p(math.exp(-2)) + math.log1p(math.exp(1)))
    alone = contrastive_loss(
        embeds, embeds, torch.tensor(3.0), None, torch.tensor([True, False]), logit_bias=torch.tensor(-1.0)
    )
    assert alone.item() == pytest.approx(loss.item())


def test_contrastive_loss_of_a_batch_without_any_image_is_zero_with_zero_gradient():
    embeds = torch.eye(2).requires_grad_()
    loss = contrastive_loss(embeds, embeds, ONE, None, torch.tensor([False, False]))
    loss.backward()
    assert loss.item() == 0 and embeds.grad.abs().sum() == 0


def test_prompt_loss_counts_only_known_findings():
    image = torch.tensor([[1.0, 0.0]])
    prompts = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [1.0, 0.0]]])
    logits = prompt_logits(image, prompt_directions(prompts), math.sqrt(2) * ONE)
    torch.testing.assert_close(logits, torch.tensor([[1.0, -1.0]]))
    known_first = finding_loss(logits, torch.tensor([[1.0, -100.0]]))
    assert known_first.item() == pytest.approx(math.log1p(math.exp(-1)) / 4)
    both = finding_loss(logits, torch.tensor([[1.0, 1.0]]))
    assert both.item() == pytest.approx((math.log1p(math.exp(-1)) + math.log1p(math.exp(1))) / 2 / 4)
    assert finding_loss(logits, torch.tensor([[-100.0, -100.0]])).item() == 0


def test_how_close_the_texts_of_a_prompt_pair_are_does_not_matter():
    far = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    close = torch.nn.functional.normalize(torch.tensor([[[1.01, 1.0], [1.0, 1.01]]]), dim=-1)
    torch.testing.assert_close(prompt_directions(far), torch.tensor([[1.0, -1.0]]) / math.sqrt(2))
    torch.testing.assert_close(prompt_directions(close), prompt_directions(far))


def test_finding_loss_is_a_rank_part_and_a_balanced_sign_part():
    logits = torch.tensor([[2.0], [1.0], [-1.0], [5.0]])
    labels = torch.tensor([[1.0], [0.0], [0.0], [-100.0]])
    rank = (math.log1p(math.exp(1 - 2)) + math.log1p(math.exp(-1 - 2))) / 2
    present = math.log1p(math.exp(-2))
    absent = (math.log1p(math.exp(1)) + math.log1p(math.exp(-1))) / 2
    assert finding_loss(logits, labels).item() == pytest.approx(rank + (present + absent) / 4, abs=1e-6)


def test_the_rank_part_does_not_reward_a_base_rate():
    labels = torch.tensor([[1.0], [0.0], [0.0], [0.0]])
    logits = torch.zeros(4, 1, requires_grad=True)
    finding_loss(logits, labels).backward()
    assert logits.grad.sum().item() == pytest.approx(0.0, abs=1e-6)  # moving all of them together changes nothing


def test_sides_have_a_loss_of_their_own_and_no_part_in_that_of_findings(config, batch):
    model = MMCLIPForPreTraining(config).eval()
    with torch.no_grad():
        losses = model(**batch).loss_info
        unknown = model(**{**batch, "side_labels": torch.full_like(batch["side_labels"], -100)}).loss_info
        model.config.side_weight = 0
        without = model(**batch).loss_info
    assert losses["side"] > 0 and unknown["side"] == 0 and losses.keys() - without.keys() == {"side"}
    for name in ("prompt", "local", "contrastive"):
        assert losses[name] == unknown[name] == without[name]


def test_prompts_that_do_not_fit_their_labels_are_refused(config, batch):
    model = MMCLIPForPreTraining(config)
    for changes in ({"side_labels": None}, {"prompt_labels": None}):
        with pytest.raises(ValueError, match="two for each column of `prompt_labels`"):
            model(**{**batch, **changes})


def test_local_prompt_loss_takes_the_soft_maximum_over_the_patches():
    prompts = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    patches = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])  # margins 1 and -1
    logit = math.log((math.e + 1 / math.e) / 2)
    logits = local_prompt_logits(patches, prompt_directions(prompts), math.sqrt(2) * ONE)
    loss = finding_loss(logits, torch.tensor([[1.0]]))
    assert loss.item() == pytest.approx(math.log1p(math.exp(-logit)) / 4)
    assert finding_loss(logits, torch.tensor([[-100.0]])).item() == 0


def test_masked_patch_loss_counts_only_hidden_patches():
    mim_logits = torch.tensor([[[2.0], [100.0]]])  # hidden patch off by 2, visible patch off by 100
    hidden = torch.tensor([[True, False]])
    assert masked_patch_loss(mim_logits, torch.zeros_like(mim_logits), hidden) == 4.0
    assert masked_patch_loss(mim_logits, torch.zeros_like(mim_logits), torch.zeros_like(hidden)) == 0.0


def test_masked_token_loss_is_the_mean_cross_entropy_and_zero_without_words():
    logits = torch.tensor([[0.0, 0.0], [0.0, math.log(3)]])  # probabilities 1/2 and 3/4 of word 1
    expected = (math.log(2) + math.log(4 / 3)) / 2
    assert masked_token_loss(logits, torch.tensor([1, 1])).item() == pytest.approx(expected)
    assert masked_token_loss(torch.zeros(0, 2), torch.zeros(0, dtype=torch.long)).item() == 0


def test_patchify_reads_patches_row_by_row():
    image = torch.arange(16.0).reshape(1, 1, 4, 4)
    patches = patchify(image, 2)
    assert patches.shape == (1, 4, 4)
    assert patches[0, 1].tolist() == [2, 3, 6, 7]  # upper right
    assert patches[0, 2].tolist() == [8, 9, 12, 13]  # lower left


def test_normalised_patches_have_mean_zero_variance_one_and_a_flat_patch_gives_zeros():
    patches = torch.tensor([[[1.0, 3.0], [5.0, 5.0]]])
    expected = torch.tensor([[[-(0.5**0.5), 0.5**0.5], [0.0, 0.0]]])  # unbiased variance of (1, 3) is 2
    torch.testing.assert_close(normalise_patches(patches), expected, atol=1e-5, rtol=0)


def test_masked_patches_come_from_the_attended_half_in_the_given_share():
    attention = torch.tensor([[8.0, 1.0, 7.0, 2.0, 6.0, 3.0, 5.0, 4.0]])  # attended half: 0, 2, 4, 6
    noise = torch.tensor([[0.9, 0.1, 0.2, 0.8, 0.3, 0.5, 0.4, 0.7]])
    hidden = select_masked_patches(noise, 0.5, attention, attended_share=0.75)
    assert hidden[0].nonzero().flatten().tolist() == [1, 2, 4, 6]  # 3 attended of lowest noise, then 1 of the rest
    hidden = select_masked_patches(noise, 0.5, attention, attended_share=1.0)
    assert hidden[0].nonzero().flatten().tolist() == [0, 2, 4, 6]
    hidden = select_masked_patches(noise, 0.75, attention, attended_share=1.0)  # 6 of 8: the rest has to give 2
    assert hidden[0].nonzero().flatten().tolist() == [0, 1, 2, 4, 5, 6]
    hidden = select_masked_patches(noise, 0.25)
    assert hidden[0].nonzero().flatten().tolist() == [1, 2]  # without attention: the lowest noise


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.9, 1.0])
def test_every_row_hides_exactly_the_asked_number_of_patches(ratio, share):
    hidden = select_masked_patches(torch.rand(6, 49), ratio, torch.rand(6, 49), share)
    assert hidden.sum(dim=1).tolist() == [round(ratio * 49)] * 6


# ------------------------------------------------------------------------------------------------------------- towers


def test_folded_patch_kernel_gives_on_grey_what_three_channels_gave_on_its_rgb_copy():
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    convolution = torch.nn.Conv2d(3, 8, 4, stride=4)
    grey = torch.rand(2, 1, 16, 16)
    rgb = (grey - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1)
    folded = fold_patch_convolution(convolution, mean, std, new_mean=0.5, new_std=0.25)
    torch.testing.assert_close(folded((grey - 0.5) / 0.25), convolution(rgb), atol=1e-5, rtol=0)


def test_a_padded_kernel_does_not_fold():
    with pytest.raises(ValueError, match="padding"):
        fold_patch_convolution(torch.nn.Conv2d(3, 8, 3, padding=1), [0.5] * 3, [0.5] * 3, 0.5, 0.25)


SHAPE = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
TOWERS = {
    "resnet": {
        "hidden_sizes": [16, 32],
        "depths": [1, 1],
        "embedding_size": 16,
        "layer_type": "basic",
        "image_size": 64,
    },
    "convnext": {"hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2, "image_size": 64},
    "dinov2": {"image_size": 64, "patch_size": 16, **SHAPE},
    "dinov2_with_registers": {"image_size": 64, "patch_size": 16, **SHAPE},
    "siglip_vision_model": {"image_size": 64, "patch_size": 16, **SHAPE},
    "clip_vision_model": {"image_size": 64, "patch_size": 16, **SHAPE},
    "swin": {
        "embed_dim": 16,
        "depths": [1, 1],
        "num_heads": [2, 2],
        "image_size": 64,
        "patch_size": 4,
        "window_size": 4,
    },
}


@pytest.mark.parametrize("model_type", TOWERS)
def test_any_vision_tower_with_patch_tokens_trains(model_type):
    fields = {"model_type": model_type, "num_channels": 1, **TOWERS[model_type]}
    model = MMCLIPForPreTraining(tiny_config(vision_config=fields))
    num_patches = model.num_patches
    batch = tiny_batch() | {"pixel_values": torch.randn(4, 1, 64, 64), "mim_noise": torch.rand(4, num_patches)}
    outputs = model(**batch)
    outputs.loss.backward()
    assert [name for name, each in model.named_parameters() if each.requires_grad and each.grad is None] == []
    expected = 64 if model_type in ("resnet", "convnext", "swin") else 16  # stride 8, or patches of 16 px
    assert num_patches == expected and outputs.text_to_patch_attention.shape == (4, expected)
    assert torch.isfinite(outputs.loss)


def test_what_no_patch_depends_on_stays_untrained_after_loading(tmp_path):
    fields = {"model_type": "clip_vision_model", "num_channels": 1, **TOWERS["clip_vision_model"]}
    MMCLIPForPreTraining(tiny_config(vision_config=fields)).save_pretrained(tmp_path)
    loaded = MMCLIPForPreTraining.from_pretrained(tmp_path)
    frozen = {name for name, parameter in loaded.named_parameters() if not parameter.requires_grad}
    assert frozen == {"vision_model.post_layernorm.weight", "vision_model.post_layernorm.bias"}


@pytest.mark.parametrize("model_type", ["resnet", "siglip_vision_model", "swin"])
def test_a_tower_without_a_first_token_cannot_be_pooled_by_it(model_type):
    fields = {"model_type": model_type, "num_channels": 1, **TOWERS[model_type]}
    with pytest.raises(ValueError, match=f"a {model_type} tower has none"):
        MMCLIPModel(tiny_config(vision_config=fields, image_pooling="cls", patch_size=16))


def test_a_tower_that_shuffles_its_patches_is_refused():
    fields = {**tiny_config().vision_config.to_dict(), "model_type": "vit_mae"}
    with pytest.raises(ValueError, match="vit_mae tower hides and shuffles"):
        MMCLIPModel(tiny_config(vision_config=fields))


@pytest.mark.parametrize("model_type", ["roberta", "distilbert", "mpnet", "electra", "albert"])
def test_any_text_tower_trains(model_type):
    fields = {"model_type": model_type, "vocab_size": 100, "pad_token_id": 0, "max_position_embeddings": 64}
    fields |= {"dim": 32, "n_layers": 1, "n_heads": 2, "hidden_dim": 64} if model_type == "distilbert" else SHAPE
    if model_type in ("electra", "albert"):
        fields |= {"embedding_size": 16}  # narrower than the hidden states
    outputs = MMCLIPForPreTraining(tiny_config(text_config=fields))(**tiny_batch())
    assert set(outputs.loss_info) == {"contrastive", "mim", "mlm", "prompt", "local", "side"}
    assert torch.isfinite(outputs.loss)


@pytest.mark.parametrize("model_type", ["siglip_vision_model", "clip_vision_model", "dinov2"])
def test_pretrained_towers_of_three_channels_give_on_grey_what_they_gave_on_its_rgb_copy(model_type, tmp_path):
    vision = AutoModel.from_config(AutoConfig.for_model(model_type, **TOWERS[model_type])).eval()
    vision.save_pretrained(tmp_path)
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]
    model = MMCLIPModel.from_vision_text_pretrained(
        tmp_path, BertConfig(vocab_size=100, **SHAPE), vision_image_mean=mean, vision_image_std=std
    ).eval()
    grey = torch.rand(2, 1, 64, 64)
    rgb = (grey - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1)
    with torch.no_grad():
        expected = vision(rgb).last_hidden_state
        found = model.get_image_features((grey - 0.5) / 0.25).last_hidden_state
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_towers_saved_in_half_precision_fit_the_new_parts_and_a_misspelt_field_is_an_error(tmp_path):
    ViTModel(ViTConfig(image_size=32, patch_size=8, num_channels=1, **SHAPE)).half().save_pretrained(tmp_path)
    text = BertConfig(vocab_size=100, **SHAPE)
    model = MMCLIPForPreTraining.from_vision_text_pretrained(tmp_path, text)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    with pytest.raises(TypeError, match="projection_dims.*Did you mean projection_dim"):
        MMCLIPModel.from_vision_text_pretrained(tmp_path, text, projection_dims=16)


def test_a_new_stem_needs_nothing_of_the_kernel_that_it_replaces(tmp_path):
    ViTModel(ViTConfig(image_size=32, patch_size=8, **SHAPE)).save_pretrained(tmp_path)  # says no image mean
    text = BertConfig(vocab_size=100, **SHAPE)
    model = MMCLIPModel.from_vision_text_pretrained(tmp_path, text, vision_stem="convolution")
    assert model.get_image_features(torch.zeros(1, 1, 32, 32)).pooler_output.shape == (1, 512)


def test_encode_after_pretrained_towers_uses_the_tokenizer_of_the_text_tower_and_the_grey_levels_given(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "edema", "no"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    BertModel(BertConfig(vocab_size=100, **SHAPE)).save_pretrained(tmp_path)
    BertTokenizerFast(vocab=str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    vision = ViTConfig(image_size=32, patch_size=8, num_channels=1, **SHAPE)
    model = MMCLIPModel.from_vision_text_pretrained(vision, tmp_path, image_mean=0.25, image_std=0.5).eval()
    _, found = model.encode(None, "no edema")
    with torch.no_grad():
        expected = model.get_text_features(torch.tensor([[2, 6, 5, 3]])).pooler_output
    torch.testing.assert_close(found, expected)
    black = model.processor(images=torch.zeros(1, 8, 8))["pixel_values"]
    assert black.unique().tolist() == [-0.5]


def encoder() -> MMCLIPModel:
    model = MMCLIPModel(tiny_config(vocab_size=6144))
    model.processor = tiny_processor()
    return model


def test_encode_reads_ahead_in_order_and_takes_one_open_file_several_times(tmp_path):
    draws = np.random.default_rng(0)
    paths = [str(tmp_path / f"{number}.png") for number in range(5)]
    for path in paths:
        Image.fromarray(draws.integers(0, 256, (90, 70), dtype=np.uint8)).save(path)
    model = encoder()
    one_by_one = torch.cat([model.encode(path)[0] for path in paths])
    torch.testing.assert_close(model.encode(paths, batch_size=2)[0], one_by_one)
    opened = Image.open(paths[0])  # decoded when it is first read
    torch.testing.assert_close(model.encode([opened] * 3, batch_size=2)[0], one_by_one[:1].expand(3, -1))


def test_encode_names_the_image_of_a_later_batch_that_it_cannot_read():
    images = [np.zeros((8, 8), dtype=np.uint8)] * 4 + [np.zeros(3)]
    with pytest.raises(ValueError, match="^image 4: .*3"):
        encoder().encode(images, batch_size=2)


def test_pretrained_towers_are_taken_over_and_folded(tmp_path):
    vision_config = ViTConfig(image_size=32, patch_size=8, **SHAPE)
    vision, text = ViTModel(vision_config), BertModel(BertConfig(vocab_size=100, **SHAPE))
    vision.save_pretrained(tmp_path / "vision")
    text.save_pretrained(tmp_path / "text")
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]
    with pytest.raises(ValueError, match="vision_image_mean"):
        MMCLIPModel.from_vision_text_pretrained(tmp_path / "vision", tmp_path / "text")
    model = MMCLIPModel.from_vision_text_pretrained(
        tmp_path / "vision", tmp_path / "text", vision_image_mean=mean, vision_image_std=std, projection_dim=16
    ).eval()
    grey = torch.rand(2, 1, 32, 32)
    rgb = (grey - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1)
    with torch.no_grad():
        expected = vision.eval()(rgb).last_hidden_state
        found = model.get_image_features((grey - 0.5) / 0.25).last_hidden_state
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    ids = torch.randint(5, 100, (2, 7))
    with torch.no_grad():
        expected_text = text.eval()(ids).last_hidden_state
        found_text = model.get_text_features(ids).last_hidden_state
    torch.testing.assert_close(found_text, expected_text)


# ------------------------------------------------------------------------------------------------------------- models


def test_one_batch_gives_every_parameter_a_gradient(batch):
    model = MMCLIPForPreTraining(tiny_config())
    model(**batch).loss.backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    zero = [
        name for name, parameter in model.named_parameters() if parameter.grad is not None and not parameter.grad.any()
    ]
    assert without == []
    # softmax does not feel a shift of all its keys, so those biases have no slope (up to rounding); nothing else may
    assert all("key" in name or "k_proj" in name for name in zero), zero


@pytest.mark.parametrize("name", ["contrastive", "mim", "mlm", "prompt", "local", "side"])
def test_a_branch_of_weight_zero_is_neither_built_nor_run(name, batch):
    model = MMCLIPForPreTraining(tiny_config(**{f"{name}_weight": 0}))
    outputs = model(**batch)
    outputs.loss.backward()
    assert name not in outputs.loss_info and len(outputs.loss_info) == 5
    assert not [key for key in model.state_dict() if key.startswith(f"{name}_head")]


def test_the_total_is_the_weighted_sum_of_its_parts(batch):
    weights = {"contrastive": 1.0, "mim": 0.5, "mlm": 2.0, "prompt": 3.0, "local": 4.0, "side": 5.0}
    model = MMCLIPForPreTraining(tiny_config(**{f"{name}_weight": weight for name, weight in weights.items()})).eval()
    outputs = model(**batch)
    total = sum(weights[name] * loss for name, loss in outputs.loss_info.items())
    torch.testing.assert_close(outputs.loss, total)


@pytest.mark.parametrize(
    "fields",
    [
        {"contrastive_loss": "sigmoid"},
        {"text_pooling": "pooler", "image_pooling": "pooler"},
        {"mim_text": False, "mim_level": "input"},
        {"mim_target": "feature", "mim_attention": "cross_attention"},
    ],
    ids=str,
)
def test_what_an_option_adds_gets_a_gradient(fields, batch):
    model = MMCLIPForPreTraining(tiny_config(**fields))
    model(**batch).loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_pixels_that_are_hidden_at_the_input_are_not_seen_by_the_decoder(batch):
    pixels = torch.arange(16.0).view(1, 1, 4, 4) + 1
    hidden = hide_pixels(pixels, torch.tensor([[True, False, False, True]]), 2)
    assert hidden[0, 0].tolist() == [[0, 0, 3, 4], [0, 0, 7, 8], [9, 10, 0, 0], [13, 14, 0, 0]]
    model = MMCLIPForPreTraining(tiny_config(mim_level="input")).eval()
    batch |= {
        "pixel_values": batch["pixel_values"].requires_grad_(),
        "bool_masked_pos": torch.arange(16).expand(4, -1) < 8,
    }
    outputs = model(**batch)
    outputs.mim_logits.sum().backward()
    gradient = batch["pixel_values"].grad[0, 0]
    assert not gradient[:16].any() and gradient[16:].any()
    without_text = MMCLIPForPreTraining(tiny_config(mim_text=False)).eval()
    one, other = (
        without_text(**(batch | {"input_ids": ids})) for ids in (batch["input_ids"], batch["input_ids"].flip(1))
    )
    torch.testing.assert_close(one.mim_logits, other.mim_logits, rtol=0, atol=0)


def test_heads_that_see_a_share_of_the_rows_see_the_first_ones(batch):
    model = MMCLIPForPreTraining(tiny_config(mim_row_ratio=0.5, mlm_row_ratio=0.25)).eval()
    outputs = model(**batch)
    assert outputs.mim_logits.shape[0] == len(outputs.bool_masked_pos) == 2
    assert len(outputs.mlm_logits) == 2  # both masked words of one row
    model.config.mim_row_ratio = model.config.mlm_row_ratio = 1.0
    few = {key: value[:2] for key, value in batch.items() if not key.startswith("prompt_")}
    torch.testing.assert_close(outputs.loss_info["mim"], model(**few).loss_info["mim"])


def test_texts_of_like_length_go_together_and_give_what_they_give_padded_to_the_longest():
    torch.manual_seed(0)
    model = MMCLIPForPreTraining(tiny_config()).eval()
    input_ids = torch.randint(5, 100, (7, 20))
    attention_mask = (torch.arange(20) < torch.tensor([[20], [3], [9], [3], [14], [2], [19]])).long()
    seen = []
    model.text_model.register_forward_hook(
        lambda module, args, kwargs, output: seen.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    pooled, tokens = model._encode_by_length(input_ids, attention_mask, 4)
    assert [tuple(shape) for shape in seen] == [(2, 3), (2, 9), (2, 19), (1, 20)]
    expected_pooled, expected_tokens, _ = model.encode_text(input_ids, attention_mask)
    torch.testing.assert_close(pooled, expected_pooled)
    mask = attention_mask.bool()
    torch.testing.assert_close(tokens[mask], expected_tokens[mask])
    assert tokens.isfinite().all()
    padded_left = model._encode_by_length(input_ids, attention_mask.flip(1), 4)
    torch.testing.assert_close(padded_left[0], model.encode_text(input_ids, attention_mask.flip(1))[0])


def test_under_the_towers_own_poolers_it_is_the_dual_encoder_of_transformers(batch):
    off = dict.fromkeys(("mim_weight", "mlm_weight", "prompt_weight", "local_weight"), 0)
    ours = MMCLIPForPreTraining(tiny_config(image_pooling="pooler", text_pooling="pooler", **off)).eval()
    towers = ours.config.vision_config, ours.config.text_config
    theirs = VisionTextDualEncoderModel(
        VisionTextDualEncoderConfig.from_vision_text_configs(*towers, projection_dim=ours.config.projection_dim)
    ).eval()
    theirs.load_state_dict(ours.state_dict())
    inputs = {key: batch[key][:3] for key in ("pixel_values", "input_ids", "attention_mask")}
    found, expected = ours(**inputs), theirs(**inputs, return_loss=True)
    torch.testing.assert_close(found.logits_per_image, expected.logits_per_image)
    torch.testing.assert_close(found.loss, expected.loss)


def test_the_tower_of_an_mmclip_checkpoint_is_taken_over(tmp_path):
    saved = MMCLIPModel(tiny_config())
    saved.save_pretrained(tmp_path)
    text = tiny_config().text_config
    model = MMCLIPModel.from_vision_text_pretrained(str(tmp_path), text, projection_dim=16)
    for name, value in saved.vision_model.state_dict().items():
        assert torch.equal(model.vision_model.state_dict()[name], value)


def test_the_image_of_a_text_only_row_is_not_looked_at(batch):
    model = MMCLIPForPreTraining(tiny_config()).eval()
    changed = batch | {"pixel_values": batch["pixel_values"].clone()}
    changed["pixel_values"][-1] = 9.0
    assert model(**batch).loss.item() == model(**changed).loss.item()
    changed["pixel_values"][0] = 9.0
    assert model(**batch).loss.item() != model(**changed).loss.item()


def test_masked_words_are_predicted_with_the_help_of_the_image_and_patches_with_the_help_of_the_text(batch):
    model = MMCLIPForPreTraining(tiny_config()).eval()
    outputs = model(**batch)
    other_image = model(**(batch | {"pixel_values": batch["pixel_values"].flip(0)}))
    assert not torch.allclose(outputs.mlm_logits[:2], other_image.mlm_logits[:2])
    hidden = {"bool_masked_pos": outputs.bool_masked_pos}
    other_text = model(**(batch | {"input_ids": batch["input_ids"].flip(1)} | hidden))
    assert not torch.allclose(model(**(batch | hidden)).mim_logits[1], other_text.mim_logits[1])


def test_shuffling_the_batch_shuffles_the_logits(batch):
    model = MMCLIPForPreTraining(tiny_config()).eval()
    order = torch.tensor([2, 0, 3, 1])
    shuffled = {key: value[order] if len(value) == 4 else value for key, value in batch.items()}
    expected = model(**batch)
    found = model(**shuffled)
    torch.testing.assert_close(found.logits_per_image, expected.logits_per_image[order][:, order])
    torch.testing.assert_close(found.loss, expected.loss)


def test_padding_changes_nothing(batch):
    model = MMCLIPForPreTraining(tiny_config()).eval()
    pad = torch.nn.functional.pad
    padded = dict(batch)
    for key, value in (("input_ids", 0), ("attention_mask", 0), ("input_ids_masked", 0), ("mlm_labels", -100)):
        padded[key] = pad(batch[key], (0, 5), value=value)
    padded["entity_mask"] = pad(batch["entity_mask"], (0, 5), value=False)
    torch.testing.assert_close(model(**padded).loss, model(**batch).loss)


def test_word_logits_have_the_masked_words_with_labels_and_every_word_without(batch):
    model = MMCLIPForPreTraining(tiny_config()).eval()
    assert model(**batch).mlm_logits.shape == (8, 100)  # two words in each of four texts
    labels = batch.pop("mlm_labels")
    every_word = model(**batch)
    assert every_word.mlm_logits.shape == (4, 10, 100) and "mlm" not in every_word.loss_info
    torch.testing.assert_close(model(**batch, mlm_labels=labels).mlm_logits, every_word.mlm_logits[labels != -100])


def test_sdpa_and_eager_attention_agree(batch):
    model = MMCLIPForPreTraining(tiny_config()).eval()
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    assert eager.config._attn_implementation == "eager" and model.config._attn_implementation == "sdpa"
    torch.testing.assert_close(eager(**batch).loss, model(**batch).loss, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("batch_size", [2, 5])  # the decoders then see four parts, some of them without a row
def test_gradient_checkpointing_gives_the_same_gradients(batch_size):
    batch = tiny_batch(batch_size)
    model = MMCLIPForPreTraining(tiny_config()).train()
    saving = copy.deepcopy(model)
    saving.gradient_checkpointing_enable()
    assert saving.is_gradient_checkpointing
    for each in (model, saving):
        each(**batch).loss.backward()
    for (name, one), (_, other) in zip(model.named_parameters(), saving.named_parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, msg=name)


def test_new_words_leave_the_old_ones_their_scores_and_are_saved(batch, tmp_path):
    model = MMCLIPForPreTraining(tiny_config()).eval()
    model.mlm_head.bias.data.normal_()
    del batch["mlm_labels"]
    before = model(**batch).mlm_logits
    model.resize_token_embeddings(110)
    after = model(**batch).mlm_logits
    assert after.shape[-1] == 110 and model.config.text_config.vocab_size == 110
    torch.testing.assert_close(after[..., :100], before)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(MMCLIPForPreTraining.from_pretrained(tmp_path)(**batch).mlm_logits, after)


def test_bfloat16_and_compile_give_the_same_loss_within_rounding(batch):
    model = MMCLIPForPreTraining(tiny_config()).eval()
    expected = model(**batch).loss
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(**batch).loss
    torch.testing.assert_close(rounded.float(), expected, rtol=0.02, atol=0.05)
    whole = copy.deepcopy(model).to(torch.bfloat16)
    in_bfloat16 = batch | {"pixel_values": batch["pixel_values"].bfloat16()}
    torch.testing.assert_close(whole(**in_bfloat16).loss.float(), expected, rtol=0.03, atol=0.1)


@pytest.mark.slow
def test_compiled_towers_have_no_graph_break_and_give_the_same_features(batch):
    model = MMCLIPModel(tiny_config(vision_stem="convolution")).eval()
    with torch.no_grad():
        expected = model(input_ids=batch["input_ids"], pixel_values=batch["pixel_values"]).logits_per_image
        compiled = torch.compile(model, fullgraph=True)
        found = compiled(input_ids=batch["input_ids"], pixel_values=batch["pixel_values"]).logits_per_image
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_a_tiny_batch_can_be_overfitted():
    torch.manual_seed(0)
    batch = tiny_batch()
    model = MMCLIPForPreTraining(tiny_config(mim_weight=0.1)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        outputs = model(**batch)
        outputs.loss.backward()
        optimizer.step()
    assert outputs.loss_info["contrastive"] < 0.1 and outputs.loss_info["mlm"] < 0.1
    assert outputs.loss_info["prompt"] < 0.1 and outputs.loss_info["mim"] < 0.9


@pytest.mark.parametrize(
    "option",
    [
        {"vision_stem": "convolution"},
        {"image_pooling": "cls"},
        {"text_pooling": "cls"},
        {"text_pooling": "max"},
        {"mim_masking": "random"},
        {"mim_mask_ratio": 0.25},
        {"mim_attended_share": 0.2},
        {"logit_scale_init_value": 1.0},
        {"decoder_num_layers": 1},
        {"decoder_num_heads": 3},
        {"initializer_range": 0.1},
        {"image_pooling": "pooler"},
        {"text_pooling": "pooler"},
        {"contrastive_loss": "sigmoid"},
        {"contrastive_loss": "sigmoid", "logit_bias_init_value": -5.0},
        {"contrastive_targets": "labels"},
        {"contrastive_targets": "labels", "label_temperature": 0.5},
        {"mim_attention": "cross_attention"},
        {"mim_level": "input"},
        {"mim_target": "feature"},
        {"mim_text": False},
        {"mim_row_ratio": 0.5},
        {"mlm_row_ratio": 0.5},
    ],
    ids=str,
)
def test_every_option_changes_the_loss(option, batch):
    default = {key: value for key, value in option.items() if key in ("contrastive_loss", "contrastive_targets")}
    losses = []
    for fields in (default if len(option) > 1 else {}, option):
        torch.manual_seed(0)
        losses.append(MMCLIPForPreTraining(tiny_config(**fields)).eval()(**batch).loss.item())
    assert losses[0] != losses[1]


def test_one_modality_alone_gives_its_embedding_first(batch):
    model = MMCLIPModel(tiny_config()).eval()
    image_only, text_only = model(pixel_values=batch["pixel_values"]), model(input_ids=batch["input_ids"])
    assert image_only[0].shape == (4, 16) and text_only[0].shape == (4, 16)
    torch.testing.assert_close(image_only.image_embeds.norm(dim=-1), torch.ones(4))
    with pytest.raises(ValueError, match="neither"):
        model()
    with pytest.raises(ValueError, match="return_loss"):
        model(pixel_values=batch["pixel_values"], return_loss=True)


def test_text_to_patch_attention_sums_to_one_and_peaks_where_the_patch_matches(batch):
    model = MMCLIPModel(tiny_config()).eval()
    attention = model.get_text_to_patch_attention(batch["pixel_values"], batch["input_ids"], batch["attention_mask"])
    torch.testing.assert_close(attention.sum(dim=-1), torch.ones(4))
    with torch.no_grad():
        model.visual_projection.weight.copy_(torch.eye(16, 32))
    patch_tokens = torch.zeros(1, 4, 32)
    patch_tokens[0, :, 0] = torch.tensor([0.1, 0.1, 1.0, 0.1])
    patch_tokens[0, :, 1] = torch.tensor([1.0, 1.0, 0.1, 1.0])
    assert model.attention_to_patches(patch_tokens, torch.eye(16)[:1]).argmax().item() == 2


def test_a_contrasting_text_takes_away_what_both_texts_share(batch):
    model = MMCLIPModel(tiny_config()).eval()
    images, ids = batch["pixel_values"], batch["input_ids"]
    against_itself = model.get_text_to_patch_attention(images, ids, contrast_input_ids=ids)
    torch.testing.assert_close(against_itself, torch.full((4, 16), 1 / 16))
    against_other = model.get_text_to_patch_attention(images, ids, contrast_input_ids=ids.flip(0))
    assert not torch.allclose(against_other, model.get_text_to_patch_attention(images, ids))


def test_one_image_takes_many_texts_and_one_contrast_goes_with_all(batch):
    model = MMCLIPModel(tiny_config()).eval()
    ids, contrast = batch["input_ids"], batch["input_ids"][:1].flip(1)
    encoded = []
    model.vision_model.register_forward_hook(lambda module, inputs, output: encoded.append(len(output[0])))
    maps = model.get_text_to_patch_attention(batch["pixel_values"][:1], ids, contrast_input_ids=contrast)
    assert encoded == [1] and maps.shape == (4, 16)
    repeated = batch["pixel_values"][:1].repeat(4, 1, 1, 1)
    each = model.get_text_to_patch_attention(repeated, ids, contrast_input_ids=contrast.repeat(4, 1))
    torch.testing.assert_close(maps, each)
    one_text = model.get_text_to_patch_attention(batch["pixel_values"], ids[:1])
    torch.testing.assert_close(one_text, model.get_text_to_patch_attention(batch["pixel_values"], ids[:1].repeat(4, 1)))
    with pytest.raises(ValueError, match=r"got \[2, 4\]"):
        model.get_text_to_patch_attention(batch["pixel_values"][:2], ids)


def test_attentions_of_both_towers_are_returned_on_request(batch):
    model = MMCLIPModel(tiny_config()).eval()
    model.set_attn_implementation("eager")
    outputs = model(batch["input_ids"], batch["pixel_values"], output_attentions=True, output_hidden_states=True)
    for tower in (outputs.text_model_output, outputs.vision_model_output):
        assert len(tower.attentions) == 2 and len(tower.hidden_states) == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_feature_map_tower_in_half_precision_takes_what_the_processor_gives(dtype):
    fields = {"model_type": "resnet", "num_channels": 1, **TOWERS["resnet"]}
    model = MMCLIPModel(tiny_config(vision_config=fields)).to(dtype).eval()
    assert model.get_image_features(torch.rand(2, 1, 64, 64)).pooler_output.dtype == dtype


@pytest.mark.parametrize(("model_type", "limit"), [("bert", 64), ("roberta", 62)])  # RoBERTa's positions begin at 2
def test_a_text_longer_than_the_tower_is_an_error_that_says_both_lengths(model_type, limit):
    fields = {"model_type": model_type, "vocab_size": 100, "max_position_embeddings": 64, **SHAPE}
    model = MMCLIPModel(tiny_config(text_config=fields)).eval()
    ids = torch.full((1, limit + 1), 7)
    assert model.get_text_features(ids[:, :-1]).pooler_output.shape == (1, 16)
    with pytest.raises(ValueError, match=rf"{limit} tokens.*\(1, {limit + 1}\)"):
        model.get_text_features(ids)


def test_pretraining_without_images_or_texts_is_an_error_that_tells_the_way(batch):
    model = MMCLIPForPreTraining(tiny_config())
    for missing in ("input_ids", "pixel_values"):
        with pytest.raises(ValueError, match="has_image.*MMCLIPModel"):
            model(**{key: value for key, value in batch.items() if key != missing})


def test_encode_without_a_saved_processor_says_what_to_save(tmp_path):
    MMCLIPModel(tiny_config()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no processor.*processor.save_pretrained"):
        MMCLIPModel.from_pretrained(tmp_path).encode(torch.zeros(1, 8, 8))


def test_an_image_of_the_wrong_size_or_channels_is_an_error_that_says_both(batch):
    with pytest.raises(ValueError, match=r"\(B, 1, 32, 32\).*\(2, 3, 32, 32\)"):
        MMCLIPModel(tiny_config())(pixel_values=torch.zeros(2, 3, 32, 32))


def test_classifier_ignores_unknown_labels_and_learns_both_problem_types(batch):
    pixel_values = batch["pixel_values"]
    model = MMCLIPForImageClassification(tiny_config(num_labels=2)).eval()
    logits = model(pixel_values).logits
    labels = torch.tensor([[1.0, -100.0], [0.0, float("nan")], [1.0, -1.0], [1.0, -100.0]])
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits[:, 0], labels[:, 0])
    torch.testing.assert_close(model(pixel_values, labels=labels).loss, expected)
    model = MMCLIPForImageClassification(tiny_config(num_labels=3, problem_type="single_label_classification")).eval()
    classes = torch.tensor([0, 1, 2, 0])
    expected = torch.nn.functional.cross_entropy(model(pixel_values).logits, classes)
    torch.testing.assert_close(model(pixel_values, labels=classes).loss, expected)


def test_a_classifier_writes_its_problem_type_down_and_refuses_labels_of_another_shape(batch):
    model = MMCLIPForImageClassification(tiny_config(num_labels=3))
    assert model.config.problem_type == "multi_label_classification"  # from which the pipeline takes its sigmoid
    with pytest.raises(ValueError, match=r"\(4, 3\).*'multi_label_classification'.*\(4,\)"):
        model(batch["pixel_values"], labels=torch.tensor([0, 1, 2, 0]))
    model = MMCLIPForImageClassification(tiny_config(num_labels=3, problem_type="single_label_classification"))
    with pytest.raises(ValueError, match=r"\(4,\).*'single_label_classification'.*\(4, 3\)"):
        model(batch["pixel_values"], labels=torch.ones(4, 3))  # cross-entropy would take them as probabilities


@pytest.mark.parametrize("model_class", [MMCLIPModel, MMCLIPForPreTraining, MMCLIPForImageClassification])
def test_saved_and_loaded_models_are_equal_to_the_last_bit(model_class, batch, tmp_path):
    model = model_class(tiny_config(vision_stem="convolution"))
    model.save_pretrained(tmp_path)
    loaded = model_class.from_pretrained(tmp_path)
    assert set(loaded.state_dict()) == set(model.state_dict())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    assert [file.name for file in tmp_path.glob("*.bin")] == [] and (tmp_path / "model.safetensors").is_file()


def test_a_pretraining_checkpoint_loads_into_the_plain_model_and_the_classifier(batch, tmp_path):
    model = MMCLIPForPreTraining(tiny_config()).eval()
    model.save_pretrained(tmp_path)
    plain = AutoModel.from_pretrained(tmp_path)
    assert type(plain).__name__ == "MMCLIPModel"
    assert torch.equal(
        plain.get_image_features(batch["pixel_values"]).pooler_output,
        model.get_image_features(batch["pixel_values"]).pooler_output,
    )
    classifier = MMCLIPForImageClassification.from_pretrained(tmp_path, num_labels=5)
    assert torch.equal(classifier.vision_model.layernorm.weight, model.vision_model.layernorm.weight)
    assert classifier.classifier.out_features == 5


def test_max_pooling_lies_between_the_mean_and_the_maximum_of_the_patches_and_keeps_a_lone_lesion():
    config = tiny_config()
    config.image_pooling = "max"
    model = MMCLIPModel(config).eval()
    batch = tiny_batch()
    pooled, patches, _ = model.encode_image(batch["pixel_values"])
    assert (pooled > patches.mean(dim=1)).all() and (pooled < patches.amax(dim=1)).all()
    by_hand = ((4 * patches).exp().mean(dim=1)).log() / 4
    assert torch.allclose(pooled, by_hand, atol=1e-5)


def test_max_pooling_of_a_text_is_over_its_own_words():
    model = MMCLIPModel(tiny_config(text_pooling="max")).eval()
    batch = tiny_batch()
    pooled, tokens, _ = model.encode_text(batch["input_ids"], batch["attention_mask"])
    words = tokens[0, :-3]  # the others are padding
    assert torch.allclose(pooled[0], (2 * words).exp().mean(dim=0).log() / 2, atol=1e-5)
    chosen = torch.zeros_like(batch["attention_mask"])
    chosen[0, 1] = 1
    pooled = model.pool_words(tokens, chosen)
    assert torch.allclose(pooled[0], tokens[0, 1], atol=1e-5)
    assert torch.equal(pooled[1], model.pool_words(tokens, torch.ones_like(chosen))[1])  # none chosen: all
