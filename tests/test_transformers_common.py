"""What transformers checks of every model of its own, run on ours: its own mixins, of the version that is installed.

They are not in its wheel: `make common` takes them out of its source archive and runs this. Without them it is skipped.
"""

import importlib.metadata
import os
import sys
import types
import unittest
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import tiny_batch, tiny_config
from torch import nn

from MMCLIP import (
    MMCLIPConfig,
    MMCLIPForImageClassification,
    MMCLIPForPreTraining,
    MMCLIPImageProcessor,
    MMCLIPModel,
    MMCLIPProcessor,
)


VERSION = importlib.metadata.version("transformers")
FOLDER = Path(os.environ.get("TRANSFORMERS_TESTS", Path(sys.prefix) / f"transformers-tests-{VERSION}"))


def mixins():
    """Three of them; what its archive lacks, and no model of ours needs, is empty."""
    package = types.ModuleType("transformers_tests")
    package.__path__ = [str(FOLDER)]
    sys.modules["transformers_tests"] = package
    absent = {
        "exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
        "generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
        "utils.test_configuration_utils": {"config_common_kwargs": {}},
    }
    fetching = types.ModuleType("fetch_hub_objects_for_ci")
    fetching.url_to_local_path = lambda url: url
    sys.modules[fetching.__name__] = fetching
    for name, contents in absent.items():
        parent = name.partition(".")[0]
        sys.modules[f"transformers_tests.{parent}"] = types.ModuleType(f"transformers_tests.{parent}")
        module = types.ModuleType(f"transformers_tests.{name}")
        module.__dict__.update(contents)
        sys.modules[module.__name__] = module
    from transformers_tests.test_configuration_common import ConfigTester
    from transformers_tests.test_modeling_common import ModelTesterMixin
    from transformers_tests.test_processing_common import ProcessorTesterMixin

    return ConfigTester, ModelTesterMixin, ProcessorTesterMixin


pytestmark = pytest.mark.slow
if not (FOLDER / "__init__.py").exists():
    pytest.skip(f"transformers' tests are not in {FOLDER}; `make common` brings them", allow_module_level=True)
ConfigTester, ModelTesterMixin, ProcessorTesterMixin = mixins()


SIDE = 32


class ModelTester:
    """The tiny model and its batch, as the mixins ask for them."""

    batch_size, seq_length, encoder_seq_length, image_size = 3, 10, 17, SIDE
    num_hidden_layers, hidden_size, num_attention_heads = 2, 32, 2
    is_training = True

    def get_config(self) -> MMCLIPConfig:
        return tiny_config(vocab_size=150)  # 50 more than the batch has, as the mixin takes some away

    def prepare_config_and_inputs_for_common(self):
        return self.get_config(), tiny_batch(self.batch_size, self.seq_length)


def not_so(reason: str):
    """A check that cannot hold, and why."""

    @unittest.skip(reason)
    def test(self):
        pass

    return test


class CommonTests(ModelTesterMixin):
    _is_composite = True
    test_reverse_loading_mapping = not_so(
        "saved under the names of the model, see MMCLIPPreTrainedModel.save_pretrained"
    )

    def setUp(self):
        self.model_tester = ModelTester()
        self.config_tester = ConfigTester(self, config_class=MMCLIPConfig, has_text_modality=False)

    def test_config(self):
        self.config_tester.run_common_tests()


class TestModel(CommonTests, unittest.TestCase):
    all_model_classes = (MMCLIPModel,)
    has_attentions = False  # of two towers; those of each are checked as its features are
    test_hidden_states_output = not_so("its towers have hidden states, which are checked with their features")
    test_retain_grad_hidden_states_attentions = not_so("the same")

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        taken = {"input_ids", "attention_mask", "pixel_values", "output_attentions", "output_hidden_states"}
        inputs = {name: value for name, value in inputs_dict.items() if name in taken}
        if "pixel_values" not in inputs:  # the mixin makes texts of its own
            draws = torch.Generator().manual_seed(0)
            inputs["pixel_values"] = torch.randn(len(inputs["input_ids"]), 1, SIDE, SIDE, generator=draws)
        return super()._prepare_for_class(inputs, model_class) | ({"return_loss": True} if return_labels else {})


class TestPreTraining(CommonTests, unittest.TestCase):
    all_model_classes = (MMCLIPForPreTraining,)
    has_attentions = False
    test_hidden_states_output = not_so("MMCLIPModel gives those of the towers")
    test_retain_grad_hidden_states_attentions = not_so("the same")
    test_can_capture_specific_layers_hidden_states = not_so("the same")
    test_capture_outputs_decorator = not_so("the same")

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        whole = tiny_batch(len(inputs_dict["input_ids"]), inputs_dict["input_ids"].shape[1])
        inputs = super()._prepare_for_class({**whole, **inputs_dict}, model_class)
        return {name: value for name, value in inputs.items() if name in whole}

    def test_model_outputs_equivalence(self):
        """As in the mixin, which cannot subtract the boolean `bool_masked_pos`."""
        config, batch = self.model_tester.prepare_config_and_inputs_for_common()
        model = MMCLIPForPreTraining(config).eval()
        found, expected = model(**batch, return_dict=False), model(**batch).to_tuple()
        assert len(found) == len(expected) > 5
        torch.testing.assert_close(found, expected)


class TestImageClassification(CommonTests, unittest.TestCase):
    all_model_classes = (MMCLIPForImageClassification,)
    test_resize_embeddings = False  # it reads no text

    def setUp(self):
        super().setUp()
        self.model_tester.seq_length = self.model_tester.encoder_seq_length  # 16 patches and the first token

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        taken = {"pixel_values", "output_attentions", "output_hidden_states"}
        inputs = {name: value for name, value in inputs_dict.items() if name in taken}
        inputs = super()._prepare_for_class(inputs, model_class)
        return inputs | ({"labels": torch.zeros(len(inputs["pixel_values"]), 2)} if return_labels else {})

    def test_model_get_set_embeddings(self):
        assert isinstance(
            MMCLIPForImageClassification(self.model_tester.get_config()).get_input_embeddings(), nn.Module
        )


class TestProcessor(ProcessorTesterMixin, unittest.TestCase):
    processor_class = MMCLIPProcessor
    test_args_overlap_kwargs = not_so(
        "options that the image processor does not know are refused, also when it is loaded"
    )

    @classmethod
    def setUpClass(cls):
        # those of transformers are not saved with their code
        cls.enterClassContext(mock.patch.object(MMCLIPProcessor, "_auto_class", None))
        super().setUpClass()

    @classmethod
    def _setup_tokenizer(cls):
        return MMCLIPProcessor().tokenizer

    @classmethod
    def _setup_image_processor(cls):
        return MMCLIPImageProcessor(size=SIDE)


del CommonTests, ModelTesterMixin, ProcessorTesterMixin  # or pytest would collect them too
