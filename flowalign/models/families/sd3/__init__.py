"""Stable Diffusion 3 and 3.5."""

from flowalign.models.families.sd3.files import check_directory, pipeline_schedule, text_parts
from flowalign.models.families.sd3.loading import TEXT, load_encoders, load_network
from flowalign.models.families.sd3.network import LORA_TARGETS
from flowalign.models.family import ModelFamily
from flowalign.models.inspect import latent_shape

FAMILY = ModelFamily(
    name="sd3",
    check=check_directory,
    load_network=load_network,
    load_encoders=load_encoders,
    latent_shape=latent_shape,
    schedule=pipeline_schedule,
    text_parts=text_parts,
    encoder_parts=("vae", *TEXT),
    lora_targets=tuple(LORA_TARGETS),
)
