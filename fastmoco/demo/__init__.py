"""The whole road on images that packages carry."""
