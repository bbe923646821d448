"""The rule that skips steps, from a calibration that ``flowalign calibrate-cache`` made, and what can be cached."""

from __future__ import annotations

from pathlib import Path

from flowalign.config.section import ConfigError
from flowalign.config.sections import CacheConfig, ModelConfig, SamplingConfig
from flowalign.flow.solvers import check_cacheable, check_solver
from flowalign.models.checked import check_cached
from flowalign.record.textfiles import read_object
from flowalign.types import CacheRule


def cache_rule(cache: CacheConfig | None) -> CacheRule | None:
    """Give the rule that a configuration names; raises ConfigError where its calibration cannot be read."""
    if cache is None:
        return None
    try:
        coefficients = read_object(Path(cache.calibration))["coefficients"]
        if not coefficients or isinstance(coefficients, str):
            raise TypeError("its coefficients are no list of numbers")
        return CacheRule(cache.threshold, tuple(float(value) for value in coefficients))
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            "cache.calibration",
            f"{cache.calibration} is no calibration ({error}); make one with flowalign calibrate-cache",
        ) from error


def check_cache(key: str, cache: CacheConfig | None, model: ModelConfig) -> None:
    """Raise ConfigError where the calibration of the cache under ``key`` cannot be read, or the model has no cache."""
    if cache is not None:
        check_cached(key, model)
    try:
        cache_rule(cache)
    except ConfigError as error:
        raise ConfigError(f"{key}.calibration", error.reason) from error


def check_sampling(section: str, sampling: SamplingConfig) -> None:
    """Raise ConfigError where the solver has no such option, or its steps cannot be cached."""
    key = f"{section}.solver"
    try:
        check_solver(sampling.solver)
        if sampling.cache is not None:
            key = f"{section}.cache"
            check_cacheable(sampling.solver)
    except ValueError as error:
        raise ConfigError(key, str(error)) from error
