"""How an integration is executed. `mfd_fast.mean_velocity` is the way in."""
