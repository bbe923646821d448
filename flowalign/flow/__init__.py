"""The mathematics of flow matching as free functions: paths, timestep densities, schedules, SDE steps, solvers.

One convention throughout: ``t = sigma`` in [0, 1], ``t = 1`` is noise, ``t = 0`` is data,
``x_t = (1 - t) x_0 + t noise``, ``velocity = dx/dt = noise - x_0``. Generation walks ``t`` down.
"""
