// A stock js-libp2p node for tests/interop; says and reads what py_peer.py says and reads.
import readline from 'node:readline'

// libp2p wants Node 22; the one thing it misses in Node 20 is this function.
Promise.withResolvers ??= function () {
  const it = {}
  it.promise = new Promise((resolve, reject) => Object.assign(it, { resolve, reject }))
  return it
}
const { createLibp2p } = await import('libp2p')
const { tcp } = await import('@libp2p/tcp')
const { noise } = await import('@chainsafe/libp2p-noise')
const { yamux } = await import('@chainsafe/libp2p-yamux')
const { identify } = await import('@libp2p/identify')
const { ping } = await import('@libp2p/ping')
const { multiaddr } = await import('@multiformats/multiaddr')

const { publicKeyFromProtobuf } = await import('@libp2p/crypto/keys')
const { peerIdFromPublicKey } = await import('@libp2p/peer-id')
const say = (facts) => console.log(JSON.stringify(facts))

const node = await createLibp2p({
  addresses: { listen: ['/ip4/127.0.0.1/tcp/0'] },
  transports: [tcp()],
  connectionEncrypters: [noise()],
  streamMuxers: [yamux()],
  services: { identify: identify({ runOnConnectionOpen: false }), ping: ping() },
  connectionGater: { denyDialMultiaddr: () => false }
})
say({ addr: node.getMultiaddrs()[0].toString(), peer: node.peerId.toString() })

async function dial (text) {
  const signal = AbortSignal.timeout(20_000)
  const connection = await node.dial(multiaddr(text), { signal })
  let pings = 0
  for (; pings < 3; pings++) await node.services.ping.ping(connection.remotePeer, { signal })
  const about = await node.services.identify.identify(connection, { signal })
  return {
    peer: about.peerId.toString(),
    pings,
    agent: about.agentVersion,
    protocol_version: about.protocolVersion,
    protocols: about.protocols,
    observed: about.observedAddr?.toString(),
    addrs: about.listenAddrs.map((addr) => addr.toString())
  }
}

function forms (request) {
  if (request.text !== undefined) {
    const { bytes } = multiaddr(request.text)
    return { bytes: Buffer.from(bytes).toString('hex'), text: multiaddr(bytes).toString() }
  }
  const peer = peerIdFromPublicKey(publicKeyFromProtobuf(Buffer.from(request.key, 'hex')))
  return { peer: peer.toString(), cid: peer.toCID().toString() }
}

for await (const line of readline.createInterface({ input: process.stdin })) {
  if (line.trim() === '') break
  try {
    const request = JSON.parse(line)
    say(request.dial === undefined ? forms(request) : await dial(request.dial))
  } catch (error) {
    say({ error: String(error) })
  }
}
await node.stop()
process.exit(0)
