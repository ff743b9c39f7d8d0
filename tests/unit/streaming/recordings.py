"""What crictl 1.36, which is client-go, sent to a streaming server, byte for byte."""

SPDY_HEAD = (
    b"POST /exec/fFq5CyQAiVsadWqSdDKIXQ HTTP/1.1\r\n"
    b"Host: 127.0.0.1:37365\r\n"
    b"User-Agent: Go-http-client/1.1\r\n"
    b"Content-Length: 0\r\n"
    b"Connection: Upgrade\r\n"
    b"Upgrade: SPDY/3.1\r\n"
    b"X-Stream-Protocol-Version: v5.channel.k8s.io\r\n"
    b"X-Stream-Protocol-Version: v4.channel.k8s.io\r\n"
    b"X-Stream-Protocol-Version: v3.channel.k8s.io\r\n"
    b"X-Stream-Protocol-Version: v2.channel.k8s.io\r\n"
    b"X-Stream-Protocol-Version: channel.k8s.io\r\n"
    b"\r\n"
)

# exec -i, with "hello" on its standard input: streams error 1, stdin 3, stdout 5, stderr 7.
SPDY_EXEC = bytes.fromhex(
    "80030001000000290000000100000000000078f9e3c6a7c26260606004a7b392a2d4c45c6851c29a"
    "0a0a6800000000ffff800300010000001700000003000000000000c22e555c92929907000000ffff"
    "800300010000001900000005000000000000c22ac5565c92925f5a02000000ffff80030001000000"
    "1500000007000000000000c229975a5404000000ffff000000030000000568656c6c6f0000000301"
    "000000"
)

# port-forward, one connection that sends "ping" to port 18555: streams error 1, data 3.
SPDY_FORWARD = bytes.fromhex(
    "800300010000003f0000000100000000000078f9e3c6a7c202253a703a2b294a4dcc851625aca9a0"
    "808614cb45a024cc6a68616a0a2a85388b20f198094adf8c0600000000ffff000000010100000080"
    "0300010000001a0000000300000000000082ea264219aa05a0b22a11000000ffff00000003000000"
    "0470696e67"
)

WEBSOCKET_HEAD = (
    b"GET /exec/Ud89LLfA88b3aqCMEL5NOg HTTP/1.1\r\n"
    b"Host: 127.0.0.1:37365\r\n"
    b"User-Agent: Go-http-client/1.1\r\n"
    b"Connection: Upgrade\r\n"
    b"Sec-WebSocket-Key: B3TLitF/japKAlbm5ZdP6w==\r\n"
    b"Sec-WebSocket-Protocol: v5.channel.k8s.io\r\n"
    b"Sec-WebSocket-Version: 13\r\n"
    b"Upgrade: websocket\r\n"
    b"\r\n"
)

# exec -i, with "hello" on its standard input, its end, and the closing at the end.
WEBSOCKET_EXEC = bytes.fromhex("828666a5eb7c66cd8e100aca82826a1f9350951f888291784af09290")
