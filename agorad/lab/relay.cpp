// What lies between the nodes of a lab: takes packets from one TUN device and gives them to another, later.
//
//   relay FD:ADDRESS:DELAY_US:JITTER_US:LOSS_PPM:DOWN_KBPS:WALLED …
//
// One word a node; its TUN device is an inherited, non-blocking descriptor. A packet waits for both ends'
// delays and up to both ends' jitter, never overtakes one before it on its way, and is lost with both ends'
// chances. DOWN_KBPS (0: any) bounds what a node receives, with a queue of QUEUE_MS; upload is bounded in the
// node's namespace. To a WALLED node (1) nothing gets that would begin a TCP connection, as behind a home
// router. Ends when standard input does. Linux only.
#include <arpa/inet.h>
#include <poll.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <queue>
#include <random>
#include <unordered_map>
#include <vector>

namespace {

constexpr int64_t kQueueNs = 100'000'000;      // what a full queue in front of a node's line holds
constexpr size_t kMaxWaiting = 64u << 20;      // bytes under way in the whole lab; more are dropped
constexpr int kBurst = 64;                     // packets read of one node before the others have their turn
constexpr size_t kNote = 10;                   // virtio_net_hdr, before what is read and written
constexpr size_t kPacket = kNote + 65536;
constexpr int64_t kTickNs = 200'000;           // packets that were delayed arrive together so often, see below

struct Node {
  int fd;
  int64_t delay_ns, jitter_ns;
  uint32_t loss_ppm;
  double ns_a_byte;  // of the download; 0: any rate
  bool walled;
  int64_t line_free = 0;
};

struct Packet {
  int64_t due;
  uint64_t number;  // packets due at once keep their order
  size_t to;
  std::vector<uint8_t> bytes;
};

struct Later {
  bool operator()(const Packet* a, const Packet* b) const {
    return a->due != b->due ? a->due > b->due : a->number > b->number;
  }
};

// Bytes that this takes of a line: the kernel's note says how a TCP segment would be cut into packets, each of
// which has the headers again.
int64_t wire_size(const uint8_t* note, const uint8_t* packet, size_t size) {
  const size_t piece = note[4] | note[5] << 8, ip = 4 * (packet[0] & 15);
  if (note[1] == 0 || piece == 0 || size < ip + 20) return int64_t(size);
  const size_t headers = ip + 4 * (packet[ip + 12] >> 4);
  if (size <= headers) return int64_t(size);
  return int64_t(size + ((size - headers - 1) / piece) * headers);
}

// Whether an IPv4 packet asks for a TCP connection: SYN without ACK.
bool begins_connection(const uint8_t* packet, size_t size) {
  const size_t header = 4 * (packet[0] & 15);
  return packet[9] == IPPROTO_TCP && size >= header + 14 && (packet[header + 13] & 0x12) == 0x02;
}

int64_t now_ns() {
  timespec at;
  clock_gettime(CLOCK_MONOTONIC, &at);
  return int64_t{at.tv_sec} * 1'000'000'000 + at.tv_nsec;
}

// Until something can be read, or this time (0: none). A timer of its own would be two more calls a packet,
// and what a relay takes of a small machine is missing in what is measured there. For the same reason it wakes
// up on ticks: what came meanwhile is handed over together, late by a tick at most, as a network card does
// that does not interrupt its host for every packet.
int wait_until(std::vector<pollfd>& polled, int64_t due) {
  const int64_t tick = (due + kTickNs - 1) / kTickNs * kTickNs;
  const int64_t left = std::max(int64_t{0}, tick - now_ns());
  const timespec limit{left / 1'000'000'000, left % 1'000'000'000};
  return ppoll(polled.data(), polled.size(), due ? &limit : nullptr, nullptr);
}

}  // namespace

int main(int count, char** words) {
  std::vector<Node> nodes;
  std::unordered_map<uint32_t, size_t> by_address;
  for (int i = 1; i < count; ++i) {
    int fd;
    char address[64];
    long long delay_us, jitter_us, down_kbps;
    unsigned loss_ppm, walled;
    in_addr parsed;
    if (sscanf(words[i], "%d:%63[^:]:%lld:%lld:%u:%lld:%u", &fd, address, &delay_us, &jitter_us, &loss_ppm,
               &down_kbps, &walled) != 7 ||
        inet_pton(AF_INET, address, &parsed) != 1) {
      fprintf(stderr, "relay: %s is no FD:ADDRESS:DELAY_US:JITTER_US:LOSS_PPM:DOWN_KBPS:WALLED\n", words[i]);
      return 2;
    }
    by_address[parsed.s_addr] = nodes.size();
    nodes.push_back({fd, delay_us * 1000, jitter_us * 1000, loss_ppm, down_kbps ? 8e6 / down_kbps : 0.0,
                     walled != 0});
  }
  const size_t n = nodes.size();
  std::vector<pollfd> polled;
  for (const Node& node : nodes) polled.push_back({node.fd, POLLIN, 0});
  polled.push_back({STDIN_FILENO, POLLIN, 0});
  std::priority_queue<Packet*, std::vector<Packet*>, Later> waiting;
  std::vector<int64_t> last(n * n, 0);
  std::mt19937 random(1);
  size_t waiting_bytes = 0;
  uint64_t number = 0;
  uint8_t buffer[kPacket];

  for (;;) {
    if (wait_until(polled, waiting.empty() ? 0 : waiting.top()->due) < 0) return 1;
    if (polled[n].revents) {
      if (read(STDIN_FILENO, buffer, sizeof buffer) <= 0) return 0;
    }
    for (size_t from = 0; from < n; ++from) {
      if (!(polled[from].revents & POLLIN)) continue;
      for (int i = 0; i < kBurst; ++i) {
        const ssize_t size = read(nodes[from].fd, buffer, sizeof buffer);
        if (size <= 0) break;
        const uint8_t* packet = buffer + kNote;
        if (size < ssize_t(kNote + 20) || packet[0] >> 4 != 4) continue;
        uint32_t address;
        memcpy(&address, packet + 16, 4);
        const auto found = by_address.find(address);
        if (found == by_address.end()) continue;
        const size_t to = found->second;
        Node &source = nodes[from], &target = nodes[to];
        if (target.walled && begins_connection(packet, size - kNote)) continue;
        if (random() % 1'000'000 < source.loss_ppm + target.loss_ppm) continue;
        if (waiting_bytes + size > kMaxWaiting) continue;
        const int64_t jitter = source.jitter_ns + target.jitter_ns;
        int64_t due = now_ns() + source.delay_ns + target.delay_ns;
        if (jitter) due += int64_t(random()) % jitter;
        due = std::max(due, last[from * n + to]);
        if (target.ns_a_byte > 0) {
          const int64_t leaves = std::max(due, target.line_free);
          if (leaves - due > kQueueNs) continue;
          target.line_free = leaves + int64_t(wire_size(buffer, packet, size - kNote) * target.ns_a_byte);
          due = target.line_free;
        }
        last[from * n + to] = due;
        waiting_bytes += size;
        waiting.push(new Packet{due, number++, to, {buffer, buffer + size}});
      }
    }
    const int64_t now = now_ns();
    while (!waiting.empty() && waiting.top()->due <= now) {
      Packet* packet = waiting.top();
      waiting.pop();
      waiting_bytes -= packet->bytes.size();
      // A node that is not up yet, or whose queue is full, loses the packet like on any line.
      if (write(nodes[packet->to].fd, packet->bytes.data(), packet->bytes.size()) < 0) number += 0;
      delete packet;
    }
  }
}
