"""Optimizers over one or more ranks: ``build_engine`` and the contract in ``base``."""

from flowalign.engine.base import Engine, EngineSettings, LossFn, NonFiniteUpdate, ResumeRefused
from flowalign.engine.build import build_engine

__all__ = ["Engine", "EngineSettings", "LossFn", "NonFiniteUpdate", "ResumeRefused", "build_engine"]
