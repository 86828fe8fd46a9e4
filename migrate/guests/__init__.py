"""The guests that come with the product; each attaches through ``migrate.guest``."""
