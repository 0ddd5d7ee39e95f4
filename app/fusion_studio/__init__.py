"""The studio in the browser: teach concepts, pick them, draw them. Uses only the public names of `fusion`."""
