"""The diffusion transformers that MM-DiT is compared with, as networks of the same signature.

All are SD3Transformer2DModels with other blocks: patches, positions, conditioning vector, last layer, gradient
checkpointing, LoRA and files are those of MM-DiT, so that a comparison is one of the blocks (arXiv:2403.03206, sec. 4).

A pipeline with one of them loads through diffusers where this module has been imported, or without flowalign from a
folder whose ``transformer/`` holds a copy of this file, under a name that diffusers itself does not use, such as
``flowalign_dit.py`` with ``"transformer": ["flowalign_dit", "ConcatDiT"]`` in the model index: it needs torch and
diffusers only.

Shapes: N samples, L text tokens, T image tokens, D width.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from diffusers import ModelMixin, SD3Transformer2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention import Attention, FeedForward
from diffusers.models.normalization import AdaLayerNormContinuous, AdaLayerNormZero
from torch import Tensor, nn

HEAD_DIM = 64
# diffusers looks a component's base class up in the component's own module, to know how it is loaded.
__all__ = ["ConcatDiT", "CrossDiT", "ModelMixin", "UViT", "adaln_zero"]


class ConcatBlock(nn.Module):
    """One set of weights over text and image tokens in one sequence."""

    context_pre_only = False  # diffusers asks the blocks of this model

    def __init__(self, dim: int, num_heads: int, qk_norm: str | None) -> None:
        super().__init__()
        self.norm1 = AdaLayerNormZero(dim)
        self.attn = _attention(dim, num_heads, qk_norm)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.ff = FeedForward(dim=dim, dim_out=dim, activation_fn="gelu-approximate")

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Compute (text (N, L, D), image (N, T, D)) from image and text tokens and the conditioning vector (N, D)."""
        length = encoder_hidden_states.shape[1]
        x = torch.cat([encoder_hidden_states, hidden_states], 1)
        normed, gate, *mlp = self.norm1(x, emb=temb)
        x = x + gate[:, None] * self.attn(normed)
        x = _feed_forward(self, x, *mlp)
        return x[:, :length], x[:, length:]


class CrossBlock(nn.Module):
    """Self-attention among image tokens, then cross-attention to the text, which stays as it was embedded.

    As in PixArt-alpha (arXiv:2310.00426, sec. 2.3) time modulates self-attention and MLP alone; the cross-attention
    has a plain norm before it and starts with a zero output projection.
    """

    context_pre_only = False

    def __init__(self, dim: int, num_heads: int, qk_norm: str | None) -> None:
        super().__init__()
        self.norm1 = AdaLayerNormZero(dim)
        self.attn = _attention(dim, num_heads, qk_norm)
        self.norm_cross = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.cross_attn = _attention(dim, num_heads, qk_norm, cross_attention_dim=dim)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.ff = FeedForward(dim=dim, dim_out=dim, activation_fn="gelu-approximate")

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Compute (text (N, L, D), image (N, T, D)) from image and text tokens and the conditioning vector (N, D)."""
        normed, gate, *mlp = self.norm1(hidden_states, emb=temb)
        x = hidden_states + gate[:, None] * self.attn(normed)
        x = x + self.cross_attn(self.norm_cross(x), encoder_hidden_states=encoder_hidden_states)
        return encoder_hidden_states, _feed_forward(self, x, *mlp)


class SkipBlock(ConcatBlock):
    """A block of the first half, which keeps its tokens, or of the second, which mixes in the last ones that were kept.

    What is kept, ``before`` times text and image at this block and ``after`` times behind it, travels behind the image
    tokens, so that a block stays a function of its tensors and can be computed anew for its backward pass.
    """

    def __init__(self, dim: int, num_heads: int, qk_norm: str | None, before: int, after: int) -> None:
        super().__init__(dim, num_heads, qk_norm)
        self.before, self.after = before, after
        self.skip = nn.Linear(2 * dim, dim) if after < before else None

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Compute the same as `ConcatBlock`, with what is kept behind the image tokens."""
        length = encoder_hidden_states.shape[1]
        count = (hidden_states.shape[1] - self.before * length) // (self.before + 1)
        text, image, kept = encoder_hidden_states, hidden_states[:, :count], hidden_states[:, count:]
        if self.skip is not None:
            last = kept.shape[1] - length - count
            both = torch.cat([torch.cat([text, image], 1), kept[:, last:]], -1)
            text, image = self.skip(both).split([length, count], 1)
            kept = kept[:, :last]
        text, image = super().forward(image, text, temb)
        more = [text, image] if self.after > self.before else []
        return text, torch.cat([image, kept, *more], 1)


class _Dit(SD3Transformer2DModel):
    """The common part of these networks; configured, saved and loaded as an SD3Transformer2DModel is."""

    block: type[nn.Module]

    @register_to_config
    def __init__(
        self,
        sample_size: int = 128,
        patch_size: int = 2,
        in_channels: int = 16,
        num_layers: int = 18,
        attention_head_dim: int = HEAD_DIM,
        num_attention_heads: int = 18,
        joint_attention_dim: int = 4096,
        caption_projection_dim: int = 1152,
        pooled_projection_dim: int = 2048,
        out_channels: int = 16,
        pos_embed_max_size: int = 96,
        dual_attention_layers: tuple[int, ...] = (),
        qk_norm: str | None = None,
    ) -> None:
        if dual_attention_layers:
            raise ValueError("dual_attention_layers are MM-DiT's; leave them out of this architecture")
        super().__init__(
            sample_size=sample_size,
            patch_size=patch_size,
            in_channels=in_channels,
            num_layers=0,
            attention_head_dim=attention_head_dim,
            num_attention_heads=num_attention_heads,
            joint_attention_dim=joint_attention_dim,
            caption_projection_dim=caption_projection_dim,
            pooled_projection_dim=pooled_projection_dim,
            out_channels=out_channels,
            pos_embed_max_size=pos_embed_max_size,
            qk_norm=qk_norm,
        )
        self.register_to_config(num_layers=num_layers)  # the parent has registered its own 0
        self.transformer_blocks = nn.ModuleList(
            self._block(index, num_layers, self.inner_dim, num_attention_heads, qk_norm) for index in range(num_layers)
        )

    def _block(self, index: int, num_layers: int, dim: int, num_heads: int, qk_norm: str | None) -> nn.Module:
        return self.block(dim, num_heads, qk_norm)


class ConcatDiT(_Dit):
    """Text and image tokens concatenated, one set of weights for both: the report's "DiT"."""

    block = ConcatBlock
    _no_split_modules: ClassVar = ["ConcatBlock"]


class CrossDiT(_Dit):
    """Image tokens alone, with cross-attention to the text: the report's "CrossDiT"."""

    block = CrossBlock
    _no_split_modules: ClassVar = ["CrossBlock"]


class UViT(_Dit):
    """ConcatDiT with a long skip connection from each block of the first half to its mirror image in the second.

    The U-ViT of arXiv:2209.12152, sec. 3.1, with ``linear(concat(x, skip))`` over all tokens, text among them; time and
    pooled text modulate its blocks as they do those of the others, where that paper has a token of the time. The SD3
    report's "UViT" is another network, with convolutions around its transformer (arXiv:2301.11093).
    """

    _no_split_modules: ClassVar = ["SkipBlock"]

    def _block(self, index: int, num_layers: int, dim: int, num_heads: int, qk_norm: str | None) -> nn.Module:
        before, after = (min(i, num_layers // 2, num_layers - i) for i in (index, index + 1))
        return SkipBlock(dim, num_heads, qk_norm, before, after)


@torch.no_grad()
def adaln_zero(network: SD3Transformer2DModel) -> None:
    """Zero what modulates, gates and projects the output: every block starts as the identity, the network as 0.

    For any of the architectures (arXiv:2212.09748, sec. 3.2).
    """
    for module in network.modules():
        if isinstance(module, (AdaLayerNormZero, AdaLayerNormContinuous)):
            _zero(module.linear)
        if isinstance(module, CrossBlock):
            _zero(module.cross_attn.get_submodule("to_out.0"))
        if isinstance(module, SkipBlock) and module.skip is not None:
            _zero(module.skip)
            nn.init.eye_(module.skip.weight)  # its first half: x as it is, nothing of the skip
    _zero(network.proj_out)


def _attention(dim: int, num_heads: int, qk_norm: str | None, **kwargs: Any) -> Attention:
    return Attention(
        query_dim=dim,
        dim_head=dim // num_heads,
        heads=num_heads,
        out_dim=dim,
        bias=True,
        qk_norm=qk_norm,
        eps=1e-6,
        **kwargs,
    )


def _feed_forward(block: Any, x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
    normed = block.norm2(x) * (1 + scale[:, None]) + shift[:, None]
    return x + gate[:, None] * block.ff(normed)


def _zero(linear: Any) -> None:
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
