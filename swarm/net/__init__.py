"""How processes find and reach each other: join strings, libp2p, signed DHT records, routing."""
