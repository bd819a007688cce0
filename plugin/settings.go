package main

import (
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"time"
)

// settings is what a host needs to start; docker plugin set changes it.
type settings struct {
	join     []string // addresses of other hosts, "host:port"
	key      []byte   // cluster key, nil or keySize bytes
	address  netip.Addr
	port     uint16 // gossip, TCP and UDP
	dataPort uint16 // VXLAN (UDP) and record stream (TCP)
	level    slog.Level
	metrics  string // TCP listen address, "" for none
	iptables string // "auto", "nft" or "legacy"
	checksum string // "auto", "on" or "off"
	program  string // "auto" or "off"
	flows    string // "on" or "off"
	subnets  []netip.Prefix
	scope    string // "local" or "global"
	public   netip.Addr
	// Of WireGuard: "auto", "kernel" or "userspace"; UDP port, and the one after it;
	// age at which the key is changed, 0 for never.
	wireguard  string
	tunnelPort uint16
	keyAge     time.Duration
	keyFile    string
	keyText    string
}

const (
	keySize         = 32
	defaultPort     = 4796
	defaultDataPort = 4797
	// The port after it is used too, while a key changes.
	defaultTunnelPort = 4798
	leastKeyAge       = time.Hour
)

// setting is one row of the table from which settings are read and the README's
// table is printed.
type setting struct {
	name, def, help string
	set             func(s *settings, value string) error
}

// settingTable holds every setting. The check of a value says what would be right.
func settingTable() []setting {
	return []setting{
		{"WEFT_JOIN", "", "other hosts to meet, `host[:port]`, separated by commas; one that answers is enough, all hosts may have the same list", setJoin},
		{"WEFT_KEY", "", "cluster key, 32 bytes as 64 hex digits or base64; encrypts what hosts tell each other; the same on all hosts. It shows in `docker plugin inspect`: WEFT_KEY_FILE does not",
			func(s *settings, v string) (err error) { s.keyText = v; _, err = parseKey(v); return err }},
		{"WEFT_KEY_FILE", "", "file with the cluster key, as the plugin sees it: `/var/lib/weft/cluster.key` is `<docker root>/plugins/<id>/propagated-mount/cluster.key` on the host",
			func(s *settings, v string) error { s.keyFile = v; return nil }},
		{"WEFT_SCOPE", "local", "`global`: a Swarm's managers create networks for all its hosts (the same on all, in a Swarm alone; restart dockerd after a change from `global`); `local`: each host creates its own",
			setWord(func(s *settings) *string { return &s.scope }, "local", "global")},
		{"WEFT_ADDRESS", "", "address by which other hosts reach this one; empty: in a Swarm the one it advertises, else that of the default route", setAddress},
		{"WEFT_PUBLIC_ADDRESS", "", "address by which hosts outside of this one's network reach it, where a NAT forwards its ports (`WEFT_PORT`, `WEFT_DATA_PORT`, `WEFT_WIREGUARD_PORT` and the one after it); empty: they use `WEFT_ADDRESS`", setPublic},
		{"WEFT_PORT", strconv.Itoa(defaultPort), "port of gossip, UDP and TCP", setPort(func(s *settings) *uint16 { return &s.port })},
		{"WEFT_DATA_PORT", strconv.Itoa(defaultDataPort), "port of VXLAN (UDP) and of records (TCP); the same on all hosts, but for those behind one NAT", setPort(func(s *settings) *uint16 { return &s.dataPort })},
		{"WEFT_WIREGUARD_PORT", strconv.Itoa(defaultTunnelPort), "UDP port of WireGuard, for encrypted networks; the next one is used while a key changes", setTunnelPort},
		{"WEFT_WIREGUARD", "auto", "`kernel` for the kernel's module, `userspace` for Weft's own; `auto` takes the module where there is one", setWord(func(s *settings) *string { return &s.wireguard }, "auto", "kernel", "userspace")},
		{"WEFT_WIREGUARD_KEY_AGE", "720h", "age at which a host changes its WireGuard key, as `720h`; `0` for never", setKeyAge},
		{"WEFT_LOG_LEVEL", "info", "`debug`, `info`, `warn` or `error`; the log goes to dockerd's",
			func(s *settings, v string) error {
				if err := s.level.UnmarshalText([]byte(v)); err != nil {
					return errors.New("use debug, info, warn or error")
				}
				return nil
			}},
		{"WEFT_METRICS", "", "TCP address for Prometheus, as `127.0.0.1:9797`; empty: only on the admin socket", setMetrics},
		{"WEFT_IPTABLES", "auto", "`nft` or `legacy`; `auto` takes what Docker uses", setWord(func(s *settings) *string { return &s.iptables }, "auto", "nft", "legacy")},
		{"WEFT_CHECKSUM_OFFLOAD", "auto", "checksum offload of VXLAN links, `on` or `off`; `auto` switches it off where kernel or driver get it wrong", setWord(func(s *settings) *string { return &s.checksum }, "auto", "on", "off")},
		{"WEFT_PROGRAM", "auto", "`off` for networks without the port program: no guard, no fast path, no flows, and no answers to virtual addresses", setWord(func(s *settings) *string { return &s.program }, "auto", "off")},
		{"WEFT_FLOWS", "on", "`off`: the port program does not count who sends what to whom (`weft flows`)", setWord(func(s *settings) *string { return &s.flows }, "on", "off")},
		{"WEFT_SUBNETS", "", "ranges from which networks with `--ipam-driver weft:latest` and without `--subnet` take theirs, as `10.96.0.0/12,fd00:77::/48`; empty: `10.32.0.0/11` in /20s and `fd77:6566:7400::/48` in /64s", setSubnets},
	}
}

// parseSettings reads the settings; an empty or missing one has its default. The
// error joins all that are wrong; the settings returned with it are usable as far
// as they go (log level, sockets).
func parseSettings(getenv func(string) string, readFile func(string) ([]byte, error)) (settings, error) {
	var s settings
	var errs []error
	for _, row := range settingTable() {
		v := strings.TrimSpace(getenv(row.name))
		if v == "" {
			v = row.def
		}
		if v == "" {
			continue
		}
		if err := row.set(&s, v); err != nil {
			errs = append(errs, fmt.Errorf("setting %s=%.60q: %w", row.name, shown(row.name, v), err))
		}
	}
	for i, host := range s.join { // now that the port is known
		s.join[i], _ = joinAddress(host, s.port) // checked before
	}
	if err := s.loadKey(readFile); err != nil {
		errs = append(errs, err)
	}
	if s.port == s.dataPort && s.port != 0 {
		errs = append(errs, fmt.Errorf("settings WEFT_PORT and WEFT_DATA_PORT are both %d; both take TCP, so choose two ports", s.port))
	}
	for name, port := range map[string]uint16{"WEFT_PORT": s.port, "WEFT_DATA_PORT": s.dataPort} {
		if s.tunnelPort != 0 && (port == s.tunnelPort || port == s.tunnelPort+1) {
			errs = append(errs, fmt.Errorf("settings %s=%d and WEFT_WIREGUARD_PORT=%d clash: WireGuard takes its port and the next one (UDP)", name, port, s.tunnelPort))
		}
	}
	if len(errs) > 0 {
		return s, wrongSettings{fmt.Errorf("%w; correct it with: docker plugin disable -f weft:latest && docker plugin set weft:latest NAME=VALUE && docker plugin enable weft:latest", errors.Join(errs...))}
	}
	return s, nil
}

// wrongSettings is an error that stays until the plugin starts with other settings.
type wrongSettings struct{ error }

// shown keeps the key out of logs.
func shown(name, value string) string {
	if name == "WEFT_KEY" {
		return "…"
	}
	return value
}

// loadKey takes the key from the file, else from the setting. A file that is
// missing is an error: without it the host would speak in the clear.
func (s *settings) loadKey(readFile func(string) ([]byte, error)) error {
	text := s.keyText
	if s.keyFile != "" {
		if text != "" {
			return errors.New("settings WEFT_KEY and WEFT_KEY_FILE are both set; keep one")
		}
		raw, err := readFile(s.keyFile)
		if err != nil {
			return fmt.Errorf("setting WEFT_KEY_FILE: %w; put the key there or clear the setting", err)
		}
		text = strings.TrimSpace(string(raw))
		if _, err := parseKey(text); err != nil {
			return fmt.Errorf("setting WEFT_KEY_FILE: file %s: %w", s.keyFile, err)
		}
	}
	s.key, _ = parseKey(text) // checked before
	return nil
}

func parseKey(v string) ([]byte, error) {
	if v == "" {
		return nil, nil
	}
	for _, decode := range []func(string) ([]byte, error){hex.DecodeString, base64.StdEncoding.DecodeString, base64.RawURLEncoding.DecodeString} {
		if key, err := decode(v); err == nil && len(key) == keySize {
			return key, nil
		}
	}
	return nil, fmt.Errorf("is not a key of %d bytes in hex or base64; make one with: openssl rand -hex %d", keySize, keySize)
}

func setJoin(s *settings, v string) error {
	for _, host := range words(v) {
		if _, err := joinAddress(host, defaultPort); err != nil {
			return err
		}
		s.join = append(s.join, host)
	}
	return nil
}

// joinAddress completes a host with the port. IPv6 may stand bare or in brackets.
func joinAddress(host string, port uint16) (string, error) {
	if a, err := netip.ParseAddr(strings.Trim(host, "[]")); err == nil {
		return net.JoinHostPort(a.String(), strconv.Itoa(int(port))), nil
	}
	name, p, err := net.SplitHostPort(host)
	if err != nil {
		name, p = host, strconv.Itoa(int(port))
	}
	if n, err := strconv.ParseUint(p, 10, 16); err != nil || n == 0 {
		return "", fmt.Errorf("%.60q has no port from 1 to 65535; write host or host:port", host)
	}
	if _, err := netip.ParseAddr(name); err != nil && (name == "" || strings.ContainsAny(name, "/:@[] ")) {
		return "", fmt.Errorf("%.60q is not a host; write a name or address, with :port if it is not %d", host, port)
	}
	return net.JoinHostPort(name, p), nil
}

func setAddress(s *settings, v string) error {
	a, err := netip.ParseAddr(v)
	if err != nil || a.IsLoopback() || a.IsMulticast() || a.IsUnspecified() || a.Zone() != "" {
		return errors.New("is not an address by which other hosts reach this one; write it as 192.0.2.10 or 2001:db8::10")
	}
	s.address = a.Unmap()
	return nil
}

func setPublic(s *settings, v string) error {
	a, err := netip.ParseAddr(v)
	shared := netip.MustParsePrefix("100.64.0.0/10") // RFC 6598, behind a provider's NAT
	switch {
	case err != nil || a.IsLoopback() || a.IsMulticast() || a.IsUnspecified() || a.Zone() != "":
		return errors.New("is not an address by which hosts outside reach this one; write it as 192.0.2.10 or 2001:db8::10")
	case a.IsPrivate() || a.IsLinkLocalUnicast() || shared.Contains(a.Unmap()):
		return errors.New("is private, so hosts outside cannot reach it; give the address of the NAT that forwards to this host, or use WEFT_ADDRESS")
	}
	s.public = a.Unmap()
	return nil
}

func setTunnelPort(s *settings, v string) error {
	if err := setPort(func(s *settings) *uint16 { return &s.tunnelPort })(s, v); err != nil {
		return err
	}
	if s.tunnelPort == 65535 {
		return errors.New("has no port after it, which is used while a key changes; use 1 to 65534")
	}
	return nil
}

func setKeyAge(s *settings, v string) (err error) {
	if s.keyAge, err = time.ParseDuration(v); err != nil {
		return errors.New("is not a time; write it as 720h")
	}
	if s.keyAge < 0 || s.keyAge > 0 && s.keyAge < leastKeyAge {
		return fmt.Errorf("is less than %s; a change takes some seconds, and traffic keys change every two minutes by themselves", leastKeyAge)
	}
	return nil
}

func setPort(field func(*settings) *uint16) func(*settings, string) error {
	return func(s *settings, v string) error {
		n, err := strconv.ParseUint(v, 10, 16)
		if err != nil || n == 0 {
			return errors.New("is not a port; use 1 to 65535")
		}
		*field(s) = uint16(n)
		return nil
	}
}

func setMetrics(s *settings, v string) error {
	host, port, err := net.SplitHostPort(v)
	if n, perr := strconv.ParseUint(port, 10, 16); err != nil || perr != nil || n == 0 {
		return errors.New("is not a listen address; write it as 127.0.0.1:9797 or :9797")
	}
	if _, err := netip.ParseAddr(host); host != "" && host != "localhost" && err != nil {
		return errors.New("wants an address of this host before the port, or nothing for all")
	}
	s.metrics = v
	return nil
}

func setWord(field func(*settings) *string, allowed ...string) func(*settings, string) error {
	return func(s *settings, v string) error {
		for _, a := range allowed {
			if strings.EqualFold(a, v) {
				*field(s) = a
				return nil
			}
		}
		return fmt.Errorf("use %s or %s", strings.Join(allowed[:len(allowed)-1], ", "), allowed[len(allowed)-1])
	}
}

func setSubnets(s *settings, v string) error {
	for _, w := range words(v) {
		p, err := netip.ParsePrefix(w)
		if err != nil {
			return fmt.Errorf("%.60q is not a range; write it as 10.96.0.0/12", w)
		}
		if p != p.Masked() {
			return fmt.Errorf("%s has bits behind the prefix; write %s", p, p.Masked())
		}
		if p.Bits() == 0 {
			return fmt.Errorf("%s is everything; choose a private range", p)
		}
		for _, special := range []string{"0.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16", "224.0.0.0/4", "::1/128", "::ffff:0:0/96", "fe80::/10", "ff00::/8"} {
			if q := netip.MustParsePrefix(special); q.Overlaps(p) {
				return fmt.Errorf("%s holds addresses of %s, which no container can have; choose a private range", p, q)
			}
		}
		for _, o := range s.subnets {
			if o.Overlaps(p) {
				return fmt.Errorf("%s and %s overlap; name each range once", o, p)
			}
		}
		s.subnets = append(s.subnets, p)
	}
	return nil
}

// words splits at commas and white space.
func words(v string) []string {
	return strings.FieldsFunc(v, func(r rune) bool { return r == ',' || r == ' ' || r == '\t' || r == '\n' })
}

// printSettings writes the README's table.
func printSettings(out io.Writer) {
	fmt.Fprint(out, "| setting | default | meaning |\n|---|---|---|\n")
	for _, row := range settingTable() {
		def := ""
		if row.def != "" {
			def = "`" + row.def + "`"
		}
		fmt.Fprintf(out, "| `%s` | %s | %s |\n", row.name, def, strings.ReplaceAll(row.help, "|", "\\|"))
	}
}

// hostName returns the name under which peers show this host.
func hostName() string {
	if name, err := os.Hostname(); err == nil {
		return name
	}
	return "unnamed"
}
