/* What the plugin tells the programs and what they tell it. Layouts are read by
 * bpf2go: keep every struct free of padding. All addresses are in network order. */
#pragma once

#include <linux/bpf.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#define MAX_PORTS 16384   /* endpoints of this host */
#define MAX_DESTS 262144  /* addresses of endpoints, of all hosts */
#define MAX_PEERS 16384
#define PINNED 1          /* LIBBPF_PIN_BY_NAME: the next process goes on with it */

/* addr is an IPv6 address, or an IPv4 one mapped into it (RFC 4291, 2.5.5.2). */
struct addr {
	__u32 w[4];
};

/* settings of this host; one, at index 0. */
struct settings {
	__u32 self;     /* IPv4 address on the underlay, or 0 */
	__u32 underlay; /* index of its link */
	__u16 port;     /* UDP port of VXLAN */
	__u16 flags;
};
#define HAS_ROUTED 1 /* look at arriving packets that are not VXLAN too */
#define HAS_FLOWS 2  /* count who sends what to whom */

/* port is an endpoint of this host, by the index of the host's side of its link. */
struct port {
	__u32 vni;
	__u32 ip4; /* 0: none */
	struct addr ip6;
	__u8 mac[6];
	__u16 flags;
	__u32 mtu; /* of the network where it may change; 0: any length passes */
};
#define PORT_GUARD 1  /* only its own addresses, no announcements of others' */
#define PORT_OTHER 2  /* ethertypes other than IPv4, IPv6 and ARP pass the guard */
#define PORT_FAST 4   /* known destinations are reached past the host's stack */
#define PORT_VIPS 16 /* its network has services with virtual addresses */
#define PORT_ROUTED 8 /* the host is the next hop of every packet */

/* dest_key names a destination: in a bridged network by MAC, in a routed one by
 * address; those networks do not overlap, so they share number 0. */
struct dest_key {
	__u32 vni;
	struct addr at;
};

struct dest {
	__u32 vni;
	__u32 link; /* host's side of a local endpoint's link, a WireGuard device, or 0 */
	__u32 peer; /* else the IPv4 underlay address of its host */
	__u8 mac[6];
	__u16 flags;
};
#define DEST_STACK 1  /* the host's stack must see its packets: something is translated */
#define DEST_VIPS 4   /* of an endpoint of this host: answers may have to be translated */
#define DEST_DIRECT 2 /* routed: the peer is on the underlay's link */
#define DEST_TUNNEL 8 /* routed: link is the WireGuard device that leads to its host */

/* service is a virtual address (key) and the tasks behind it. */
#define MAX_SERVICES 4096
#define MAX_BACKENDS 512
struct backend {
	__u32 ip4;
	__u8 mac[6];
	__u16 zero;
};

struct service {
	__u32 n;
	struct backend backends[MAX_BACKENDS];
};

/* flow is one of a client, in one direction; of ICMP the source port is the identifier. */
#define MAX_FLOWS 65536
struct flow {
	__u32 vni;
	__u32 src;
	__u32 dst;
	__be16 sport;
	__be16 dport;
	__u32 proto;
};

/* flow_to is the task of a flow to a virtual address. */
struct flow_to {
	__u32 ip4;
	__u8 mac[6];
	__u16 closed; /* of TCP, by whom */
};
#define CLOSED_CLIENT 1
#define CLOSED_TASK 2

/* part names the fragments of a packet (RFC 791), of which the first alone has ports. */
#define MAX_PARTS 8192
struct part {
	__u32 vni;
	__u32 src;
	__u32 dst;
	__be16 id;
	__u16 proto;
};

/* counters of one port. */
#define REASONS 16
struct counters {
	__u64 dropped[REASONS];
	__u64 fast;
	__u64 slow;
};

/* Why the guard dropped a frame; dataplane/kernel/program.go has the words. */
enum reason {
	PASS,
	DROP_SHORT,
	DROP_MAC,
	DROP_IP4,
	DROP_IP6,
	DROP_ARP,
	DROP_ND,
	DROP_RA,
	DROP_DHCP,
	DROP_BRIDGE,
	DROP_VLAN,
	DROP_TYPE,
	DROP_HEADERS,
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct settings);
	__uint(pinning, PINNED);
} weft_settings SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MAX_PORTS);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __u32);
	__type(value, struct port);
	__uint(pinning, PINNED);
} weft_ports SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MAX_DESTS);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct dest_key);
	__type(value, struct dest);
	__uint(pinning, PINNED);
} weft_dests SEC(".maps");

/* weft_peers holds the hosts from which VXLAN is taken. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MAX_PEERS);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __u32);
	__type(value, __u32);
	__uint(pinning, PINNED);
} weft_peers SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_HASH);
	__uint(max_entries, MAX_PORTS);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __u32);
	__type(value, struct counters);
	__uint(pinning, PINNED);
} weft_counters SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MAX_SERVICES);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct dest_key);
	__type(value, struct service);
	__uint(pinning, PINNED);
} weft_services SEC(".maps");

/* weft_flows_to and weft_flows_from have connections of TCP from their first
 * acknowledgement until both sides have closed them, for those may be silent for long;
 * weft_brief_to and weft_brief_from all else. So what comes and goes pushes out only
 * its like. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, MAX_FLOWS);
	__type(key, struct flow);
	__type(value, struct flow_to);
	__uint(pinning, PINNED);
} weft_flows_to SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, MAX_FLOWS);
	__type(key, struct flow);
	__type(value, struct flow_to);
	__uint(pinning, PINNED);
} weft_brief_to SEC(".maps");

/* weft_flows_from has the virtual address of a flow from a task to its client. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, MAX_FLOWS);
	__type(key, struct flow);
	__type(value, __u32);
	__uint(pinning, PINNED);
} weft_flows_from SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, MAX_FLOWS);
	__type(key, struct flow);
	__type(value, __u32);
	__uint(pinning, PINNED);
} weft_brief_from SEC(".maps");

/* weft_parts has the task, or from a task the virtual address, that the first fragment
 * got: the next ones get it too. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, MAX_PARTS);
	__type(key, struct part);
	__type(value, struct flow_to);
	__uint(pinning, PINNED);
} weft_parts SEC(".maps");
