"""Solar schedules for Umbel: sunrise, sunset, noon, dawn and dusk of a place."""
