"""Generated input: no clock of its own (every test has pytest's deadline), nothing remembered on disk."""

from hypothesis import HealthCheck, settings

settings.register_profile("postcopy", deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("postcopy")
