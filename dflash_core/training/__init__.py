"""Training a draft model: data, anchors, loss and the recipe; inference never imports it."""
