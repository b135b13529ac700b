"""Messages to objects and back: the only place that knows how an object is spelled on the wire."""
