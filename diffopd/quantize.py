"""A frozen trunk in fewer bits, by diffusers' own quantization configs; nothing is quantized here.

The student's adapter, gradients and states stay float32. Evaluation and export use the base as it is on disk.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

from diffopd.errors import UserError

if TYPE_CHECKING:
    from diffopd.recipe import Recipe

PACKAGES = {"bnb-4bit": "bitsandbytes", "bnb-8bit": "bitsandbytes", "torchao-int8": "torchao"}
BACKENDS = {
    "bitsandbytes_4bit": "bitsandbytes",
    "bitsandbytes_8bit": "bitsandbytes",
    "torchao": "torchao",
    "quanto": "optimum",
}


def check_quantization(recipe: Recipe) -> None:
    """Raise UserError where the package of the wanted quantization is not installed."""
    wanted = recipe.student.quantization
    package = PACKAGES.get(wanted) if isinstance(wanted, str) else BACKENDS.get(wanted["quant_backend"])
    if package is None or importlib.util.find_spec(package) is not None:
        return
    remedy = "Install optimum-quanto" if package == "optimum" else f"Install diffopd[{package}]"
    raise UserError(
        f"{recipe.place('student', 'quantization')}: student.quantization asks for {package}, which is not installed. "
        f'{remedy}, or set student.quantization = "none".'
    )


def quantization_config(recipe: Recipe, denoiser: str) -> Any:
    """What `from_pretrained` takes to quantize the component `denoiser`, None for "none".

    Raises UserError where diffusers refuses the table.
    """
    wanted = recipe.student.quantization
    if wanted == "none":
        return None
    check_quantization(recipe)
    from diffusers import PipelineQuantizationConfig
    from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    if wanted == "torchao-int8":
        return PipelineQuantizationConfig(quant_mapping={denoiser: _torchao_int8()})
    table = wanted if isinstance(wanted, dict) else _bitsandbytes(wanted, recipe.train.frozen_dtype)
    try:
        made = PipelineQuantizationConfig(**{"components_to_quantize": [denoiser], **table})
        AUTO_QUANTIZATION_CONFIG_MAPPING[table["quant_backend"]](**table.get("quant_kwargs", {}))
    except (ValueError, TypeError, ImportError) as error:
        place, reason = recipe.place("student", "quantization"), " ".join(str(error).split())
        raise UserError(f"{place}: diffusers refuses student.quantization = {wanted!r}: {reason}") from error
    return made


def _torchao_int8() -> Any:
    from diffusers import TorchAoConfig
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def _bitsandbytes(name: str, frozen_dtype: str) -> dict[str, Any]:
    if name == "bnb-8bit":
        return {"quant_backend": "bitsandbytes_8bit", "quant_kwargs": {"load_in_8bit": True}}
    from diffopd.precision import DTYPES

    options = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": DTYPES[frozen_dtype]}
    return {"quant_backend": "bitsandbytes_4bit", "quant_kwargs": options}
