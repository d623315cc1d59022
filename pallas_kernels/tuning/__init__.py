"""The search for tiles on a device, and the tables that it fills."""
