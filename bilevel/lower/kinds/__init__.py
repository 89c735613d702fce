"""Lower levels that are not the minimum of a smooth objective: fixed points, proximal problems, roots."""
