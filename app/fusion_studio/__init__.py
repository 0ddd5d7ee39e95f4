"""The studio in the browser: teach concepts, pick them, draw them. Sees only the public names of `fusion`."""
