"""The exercises of the chapters: what their checks demand, and the mistakes that they catch."""
