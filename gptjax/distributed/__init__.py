"""Where arrays live: the mesh of devices, and one table that says how parameters are split over it."""
