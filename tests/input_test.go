package tests

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/weftnet/weft/tests/hosts"
)

// TestBadInput sends what no engine sends to the running plugin's own socket. Each
// is refused with a word of what is wrong, changes nothing and harms nobody.
func TestBadInput(t *testing.T) {
	t.Parallel()
	lab := newLab(t, 1, nil)
	install(t, lab, pluginDir(t, "", "test"))
	h := lab.Hosts[0]
	docker(t, h, "network", "create", "-d", hosts.PluginName, "--ipam-driver", hosts.PluginName, "--subnet", "10.60.0.0/24", "--gateway", "10.60.0.1", "real")
	c := run(t, h, "real", "--network", "real", "--ip", "10.60.0.10")
	pid, err := h.PluginPID(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	s := &socketTest{host: h, dir: fmt.Sprintf("/proc/%d/root/run/docker/plugins/", pid)}
	s.network = networkOf(t, h, "real")
	s.endpoint = view[[]endpointView](t, h, "endpoints")[0]

	before := s.records(t)
	rows := s.rows()
	for _, r := range rows {
		status, said := s.send(t, r.method, r.path, strings.NewReader(r.body))
		if r.want == "" { // a repeated clean-up is a success
			if status != http.StatusOK || said != "" {
				t.Errorf("%s %.80s: status %d, %q; want success", r.path, r.body, status, said)
			}
		} else if said == "" || !strings.Contains(said, r.want) {
			t.Errorf("%s %.120s: status %d, Err %q; want one with %q", r.path, r.body, status, said, r.want)
		}
		if now := s.records(t); now != before {
			t.Fatalf("%s %.120s changed the records:\n%s", r.path, r.body, difference(before, now))
		}
	}
	n := len(rows) + s.raw(t)
	s.atTheSameTime(t)
	s.slowClients(t)
	if now := s.records(t); now != before {
		t.Errorf("the records changed:\n%s", difference(before, now))
	}
	if now, err := h.PluginPID(t.Context(), ""); err != nil || now != pid {
		t.Errorf("the plugin was process %d and is %d, %v", pid, now, err)
	}
	if raw, err := os.ReadFile(h.LogFile()); err != nil || bytes.Contains(raw, []byte("panic")) {
		t.Errorf("the log tells of a panic: %v", err)
	}
	command(t, c, "true")
	docker(t, h, "rm", "--force", "real")
	clean(t, h)
	figure(t, "26 bad input to the real socket", n, "changed state: 0, panics: 0")
}

// socketTest is a running plugin, with a network and an endpoint that exist.
type socketTest struct {
	host     *hosts.Host
	dir      string // of its sockets
	network  networkView
	endpoint endpointView
}

// records returns all that a call may change.
func (s *socketTest) records(t *testing.T) string {
	t.Helper()
	var out strings.Builder
	for _, path := range []string{"networks", "endpoints", "ipam"} {
		resp, err := unixClient(s.dir + "weft-admin.sock").Get("http://weft/v1/" + path)
		if err != nil {
			t.Fatal(err)
		}
		var all []map[string]any
		err = json.NewDecoder(resp.Body).Decode(&all)
		_ = resp.Body.Close()
		if err != nil {
			t.Fatal(err)
		}
		for _, one := range all {
			delete(one, "status") // of the last pass
			// In networks why the program is off, in endpoints what it has counted.
			if _, counts := one["program"].(map[string]any); counts {
				delete(one, "program")
			}
			line, err := json.Marshal(one)
			if err != nil {
				t.Fatal(err)
			}
			fmt.Fprintf(&out, "%s\n", line)
		}
	}
	return out.String()
}

// send sends one request and returns the status and the text of Err.
func (s *socketTest) send(t *testing.T, method, path string, body io.Reader) (int, string) {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), method, "http://weft/"+path, body)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := unixClient(s.dir + "weft.sock").Do(r)
	if err != nil {
		return 0, err.Error() // cut off while it still sent
	}
	defer func() { _ = resp.Body.Close() }()
	var said struct{ Err, Error string }
	raw, err := io.ReadAll(resp.Body)
	if err == nil {
		err = json.Unmarshal(raw, &said)
	}
	if err != nil || said.Err != said.Error {
		t.Errorf("%s: answer %q: %v", path, raw, err)
	}
	return resp.StatusCode, said.Err
}

// A bodyRow is a request, and a word that its refusal must hold; empty for those
// that are answered with success.
type bodyRow struct{ method, path, body, want string }

func (s *socketTest) rows() []bodyRow {
	var out []bodyRow
	post := func(path, want, body string, args ...any) {
		out = append(out, bodyRow{"POST", path, fmt.Sprintf(body, args...), want})
	}
	const (
		createN, createE       = "NetworkDriver.CreateNetwork", "NetworkDriver.CreateEndpoint"
		requestP, requestA     = "IpamDriver.RequestPool", "IpamDriver.RequestAddress"
		newID                  = "feedfeedfeedfeedfeedfeedfeedfeedfeedfeedfeedfeedfeedfeedfeedfeed"
		newNetwork             = `{"NetworkID":"` + newID + `","IPv4Data":[%s],"Options":{"com.docker.network.generic":{%s}}}`
		goodPool               = `{"Pool":"10.61.0.0/24","Gateway":"10.61.0.1/24"}`
		newEndpoint            = `{"NetworkID":%q,"EndpointID":%q,"Interface":{"Address":%q,"AddressIPv6":"","MacAddress":%q},"Options":{}}`
		poolBody, existingPool = `{"AddressSpace":"WeftLocal","Pool":%q,"SubPool":%q,"Options":%s,"V6":false}`, "WeftLocal/10.60.0.0/24"
	)
	n, e := s.network.ID, s.endpoint.ID
	// The transport.
	for _, path := range []string{createN, "NetworkDriver.DeleteNetwork", createE, "NetworkDriver.DeleteEndpoint", "NetworkDriver.Join",
		"NetworkDriver.Leave", "NetworkDriver.AllocateNetwork", "NetworkDriver.FreeNetwork", "NetworkDriver.DiscoverNew", requestP, "IpamDriver.ReleasePool", requestA, "IpamDriver.ReleaseAddress"} {
		out = append(out, bodyRow{"GET", path, "", "POST"}, bodyRow{"PUT", path, "{}", "POST"})
		post(path, "empty", "")
		post(path, "JSON", "[]")
		post(path, "JSON", "null")
		post(path, "JSON", `{"NetworkID":`)
		post(path, "JSON", "\x00\xff\xfe")
		post(path, "larger", "%s", `{"NetworkID":"`+strings.Repeat("a", 1<<20)+`"}`)
		post(path, "depth", "%s", `{"Options":`+strings.Repeat(`{"a":`, 20000)+"1"+strings.Repeat("}", 20001))
	}
	out = append(out, bodyRow{"POST", "NetworkDriver.Explode", "{}", "NetworkDriver.Explode"}, bodyRow{"GET", "", "", "not know"}, bodyRow{"POST", "../../etc/passwd", "{}", "not know"})
	// Ids and types.
	post(createN, "NetworkID", `{"NetworkID":5}`)
	post(createE, "EndpointID", `{"NetworkID":%q,"EndpointID":{}}`, n)
	post(createN, "IPv4Data", `{"NetworkID":%q,"IPv4Data":"10.61.0.0/24"}`, newID)
	for _, id := range []string{"", "../../etc", "a b", `a\u0000b`, "ä", "\xff", strings.Repeat("a", 4096), "a\\nb", "$(reboot)"} {
		post(createN, "NetworkID", `{"NetworkID":"%s","IPv4Data":[%s]}`, id, goodPool)
		post(createE, "EndpointID", `{"NetworkID":%q,"EndpointID":"%s","Interface":{"Address":"10.60.0.77/24"}}`, n, id)
	}
	// Networks.
	post(createN, "subnet", newNetwork, "", "")
	post(createN, "null", newNetwork, "null", "")
	post(createN, "overlap", newNetwork, goodPool+","+goodPool, "")
	for _, pool := range []string{"10.61.0.1/24", "0.0.0.0/0", "10.61.0.1/32", "224.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16", "::ffff:10.61.0.0/120", "fd00::/128", "ten", ""} {
		post(createN, "pool", newNetwork, fmt.Sprintf(`{"Pool":%q}`, pool), "")
	}
	post(createN, "10.62.0.1", newNetwork, `{"Pool":"10.61.0.0/24","Gateway":"10.62.0.1/24"}`, "")
	post(createN, "aux", newNetwork, `{"Pool":"10.61.0.0/24","AuxAddresses":{"x":"10.62.0.1/24"}}`, "")
	post(createN, "aux", newNetwork, `{"Pool":"10.61.0.0/24","AuxAddresses":{"x":7}}`, "")
	post(createN, "10.60.0.0", newNetwork, `{"Pool":"10.60.0.128/25"}`, "")
	post(createN, "eth0", newNetwork, `{"Pool":"192.0.2.0/24"}`, "")
	post(createN, "exists", `{"NetworkID":%q,"IPv4Data":[%s]}`, n, goodPool)
	for option, want := range map[string]string{`"vnii":"7"`: "did you mean vni", `"mtu":"-1"`: "MTU", `"mtu":"0"`: "MTU", `"mtu":"65536"`: "MTU", `"mtu":1400`: "text", `"vni":"0"`: "vni",
		`"vni":"16777216"`: "16777216", `"vni":"; reboot"`: "vni", `"ifname":"$(x)"`: "ifname", `"ifname":"` + strings.Repeat("x", 65536) + `"`: "ifname", `"internal":"TRUE!"`: "internal",
		`"mtu":"1400","weft.mtu":"1300"`: "contradict", `"encrypted":"perhaps"`: "encrypt", "\"a`b\\n\":\"1\"": "not known"} {
		post(createN, want, newNetwork, goodPool, option)
	}
	post(createN, "generic", `{"NetworkID":%q,"IPv4Data":[%s],"Options":{"com.docker.network.generic":[]}}`, newID, goodPool)
	// What a Swarm's manager asks, and what Docker tells of its hosts.
	for options, want := range map[string]string{`"vnii":"7"`: "did you mean vni", `"encrypted":"perhaps"`: "encrypt", `"weft.vni":"0"`: "vni", `"weft.key":"00"`: "key of 32 bytes", `"meet":"0.0.0.0"`: "address of a host",
		`"vni":"5000","weft.vni":"5001"`: "contradict", fmt.Sprintf(`"vni":"%d"`, s.network.VNI): "belongs to Weft network"} {
		post("NetworkDriver.AllocateNetwork", want, `{"NetworkID":%q,"Options":{%s},"IPv4Data":[%s]}`, newID, options, goodPool)
	}
	post("NetworkDriver.AllocateNetwork", "subnet", `{"NetworkID":%q,"Options":{},"IPv4Data":[]}`, newID)
	post("NetworkDriver.AllocateNetwork", "NetworkID", `{"NetworkID":"a b","Options":{},"IPv4Data":[%s]}`, goodPool)
	post("NetworkDriver.AllocateNetwork", "Options", `{"NetworkID":%q,"Options":[],"IPv4Data":[%s]}`, newID, goodPool)
	for _, address := range []string{"", "ten", "0.0.0.0", "224.0.0.1", "fe80::1%eth0"} {
		post("NetworkDriver.DiscoverNew", "DiscoveryData.Address", `{"DiscoveryType":1,"DiscoveryData":{"Address":%q,"Self":false}}`, address)
	}
	post("NetworkDriver.DiscoverNew", "Self", `{"DiscoveryType":1,"DiscoveryData":{"Address":"192.0.2.9","Self":"yes"}}`)
	post("NetworkDriver.FreeNetwork", "", `{"NetworkID":%q}`, newID)
	// Endpoints, and calls in a wrong order.
	post(createE, "network rm", newEndpoint, newID, newID, "10.61.0.9/24", "")
	for address, want := range map[string]string{"": "Address", "10.60.0.77": "length", "10.61.0.9/24": "10.61.0.9", "10.60.0.0/24": "10.60.0.0", "10.60.0.255/24": "broadcast", "10.60.0.10/24": "10.60.0.10", "fd00::1/64": "famil"} {
		post(createE, want, newEndpoint, n, newID, address, "")
	}
	for _, mac := range []string{"x", "01:00:5e:00:00:01", "00:00:00:00:00:00", "ff:ff:ff:ff:ff:ff", s.endpoint.MAC} {
		post(createE, "MAC", newEndpoint, n, newID, "10.60.0.77/24", mac)
	}
	post(createE, "exists", newEndpoint, n, e, "10.60.0.77/24", "")
	post("NetworkDriver.Join", "not found", `{"NetworkID":%q,"EndpointID":%q,"SandboxKey":"/run/docker/netns/x"}`, n, newID)
	post("NetworkDriver.Join", "network rm", `{"NetworkID":%q,"EndpointID":%q,"SandboxKey":"/run/docker/netns/x"}`, newID, newID)
	post("NetworkDriver.Join", "SandboxKey", `{"NetworkID":%q,"EndpointID":%q}`, n, e)
	post("NetworkDriver.Join", "leave", `{"NetworkID":%q,"EndpointID":%q,"SandboxKey":"/run/docker/netns/other"}`, n, e)
	for _, path := range []string{"Leave", "DeleteEndpoint", "EndpointOperInfo", "DeleteNetwork"} {
		post("NetworkDriver."+path, "", `{"NetworkID":%q,"EndpointID":%q}`, newID, newID)
	}
	// IPAM.
	post(requestP, "AddressSpace", `{"AddressSpace":"Mars","Pool":"10.61.0.0/24"}`)
	for pool, want := range map[string]string{"10.61.0.1/24": "10.61.0.0/24", "0.0.0.0/0": "every", "10.61.0.0/32": "small", "224.0.0.0/4": "224.0.0.0", "ten": "ten", "10.60.0.0/16": "10.60.0.0/24", "192.0.2.0/25": "192.0.2.0/24"} {
		post(requestP, want, poolBody, pool, "", "{}")
	}
	post(requestP, "10.62.0.0/25", poolBody, "10.61.0.0/24", "10.62.0.0/25", "{}")
	post(requestP, "SubPool", poolBody, "", "10.62.0.0/25", "{}")
	post(requestP, "colour", poolBody, "10.61.0.0/24", "", `{"colour":"red"}`)
	for address, want := range map[string]string{"10.61.0.9": "outside", "10.60.0.0": "network address", "10.60.0.255": "broadcast", "10.60.0.1": "gateway", "10.60.0.10": "taken", "::ffff:10.60.0.9": "IPv6 form", "x": "IP address"} {
		post(requestA, want, `{"PoolID":%q,"Address":%q,"Options":null}`, existingPool, address)
	}
	for _, pool := range []string{"", "x", "WeftLocal/10.60.0.0", "Mars/10.60.0.0/24", "WeftLocal/10.60.0.0/24/10.61.0.0/25"} {
		post(requestA, "PoolID", `{"PoolID":%q,"Address":"","Options":null}`, pool)
	}
	post("IpamDriver.ReleaseAddress", "", `{"PoolID":%q,"Address":"10.60.0.200"}`, existingPool)
	post("IpamDriver.ReleaseAddress", "", `{"PoolID":"WeftLocal/10.99.0.0/24","Address":"10.99.0.5"}`)
	post("IpamDriver.ReleasePool", "", `{"PoolID":"WeftLocal/10.99.0.0/24"}`)
	return out
}

// raw sends what no HTTP client would, and returns how many of it.
func (s *socketTest) raw(t *testing.T) int {
	t.Helper()
	const head = "POST /NetworkDriver.CreateNetwork HTTP/1.1\r\nHost: weft\r\n"
	all := []string{
		"", "\r\n\r\n", "hello\r\n\r\n", "GET / HTTP/9.9\r\n\r\n",
		head + "Content-Length: 100\r\n\r\n{\"NetworkID\":",
		head + "Content-Length: -1\r\n\r\n{}", head + "Content-Length: 99999999999999999999\r\n\r\n",
		head + "Transfer-Encoding: chunked\r\n\r\n10\r\n{\"Netw", head + "Transfer-Encoding: chunked\r\n\r\nzz\r\n",
		head + "X: " + strings.Repeat("x", 1<<20) + "\r\n\r\n",
		head + "Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
	}
	for _, text := range all {
		conn, err := net.Dial("unix", s.dir+"weft.sock")
		if err != nil {
			t.Fatal(err)
		}
		_ = conn.SetDeadline(time.Now().Add(10 * time.Second))
		_, _ = conn.Write([]byte(text)) // it may be refused half way
		_ = conn.(*net.UnixConn).CloseWrite()
		answer, err := io.ReadAll(conn)
		if bytes.Contains(answer, []byte(" 200 OK")) || errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("%.60q is answered %.200q, %v", text, answer, err)
		}
		_ = conn.Close()
	}
	return len(all)
}

// atTheSameTime sends the same calls and contradicting ones at once: one content
// wins, the other is refused.
func (s *socketTest) atTheSameTime(t *testing.T) {
	t.Helper()
	const id = "beefbeefbeefbeefbeefbeefbeefbeefbeefbeefbeefbeefbeefbeefbeefbeef"
	network := func(pool string) string {
		return fmt.Sprintf(`{"NetworkID":%q,"IPv4Data":[{"Pool":%q}]}`, id, pool)
	}
	endpoint := func(id, address string) string {
		return fmt.Sprintf(`{"NetworkID":%q,"EndpointID":%q,"Interface":{"Address":%q}}`, s.network.ID, id, address)
	}
	for _, c := range []struct {
		path, a, b string
		good       int
		undo       []string // pairs of path and body
	}{
		{"NetworkDriver.CreateNetwork", network("10.63.0.0/24"), network("10.63.0.0/24"), 2, []string{"NetworkDriver.DeleteNetwork", network("")}},
		{"NetworkDriver.CreateNetwork", network("10.63.0.0/24"), network("10.64.0.0/24"), 1, []string{"NetworkDriver.DeleteNetwork", network("")}},
		{"NetworkDriver.CreateEndpoint", endpoint(id, "10.60.0.70/24"), endpoint(id, "10.60.0.70/24"), 2, []string{"NetworkDriver.DeleteEndpoint", endpoint(id, "")}},
		{"NetworkDriver.CreateEndpoint", endpoint(id, "10.60.0.70/24"), endpoint(id, "10.60.0.71/24"), 1, []string{"NetworkDriver.DeleteEndpoint", endpoint(id, "")}},
		{"NetworkDriver.CreateEndpoint", endpoint(id, "10.60.0.70/24"), endpoint(id+"2", "10.60.0.70/24"), 1,
			[]string{"NetworkDriver.DeleteEndpoint", endpoint(id, ""), "NetworkDriver.DeleteEndpoint", endpoint(id+"2", "")}},
	} {
		var group sync.WaitGroup
		said := make([]string, 2)
		for i, body := range []string{c.a, c.b} {
			group.Go(func() { _, said[i] = s.send(t, http.MethodPost, c.path, strings.NewReader(body)) })
		}
		group.Wait()
		good := 0
		for _, text := range said {
			if text == "" {
				good++
			}
		}
		if good != c.good {
			t.Errorf("%s %s and %s at once: %q; want %d successes", c.path, c.a, c.b, said, c.good)
		}
		for i := 0; i < len(c.undo); i += 2 {
			if _, text := s.send(t, http.MethodPost, c.undo[i], strings.NewReader(c.undo[i+1])); text != "" {
				t.Errorf("%s: %s", c.undo[i], text)
			}
		}
	}
}

// slowClients opens many connections that send their request byte by byte, and
// sees others served meanwhile, and the slow ones cut off.
func (s *socketTest) slowClients(t *testing.T) {
	t.Helper()
	const many = 50
	var group sync.WaitGroup
	cut := make([]time.Duration, many)
	for i := range many {
		conn, err := net.Dial("unix", s.dir+"weft.sock")
		if err != nil {
			t.Fatal(err)
		}
		group.Go(func() {
			defer func() { _ = conn.Close() }()
			start := time.Now()
			tick := time.NewTicker(200 * time.Millisecond)
			defer tick.Stop()
			_, err := conn.Write([]byte("POST /NetworkDriver.CreateNetwork HTTP/1.1\r\nHost: weft\r\nContent-Length: 1000\r\n\r\n"))
			for err == nil && time.Since(start) < 20*time.Second {
				<-tick.C
				_, err = conn.Write([]byte(" "))
			}
			cut[i] = time.Since(start)
		})
	}
	slowest := time.Duration(0)
	for range 20 {
		start := time.Now()
		if status, text := s.send(t, http.MethodPost, "NetworkDriver.Leave", strings.NewReader(`{"NetworkID":"x","EndpointID":"y"}`)); status != http.StatusOK || text != "" {
			t.Errorf("beside slow clients a call gets status %d, %q", status, text)
		}
		slowest = max(slowest, time.Since(start))
	}
	group.Wait()
	if slowest > 2*time.Second {
		t.Errorf("beside slow clients a call takes %s", slowest)
	}
	if percentile(cut, 100) > 15*time.Second {
		t.Errorf("slow clients are cut off after %s", percentile(cut, 100))
	}
	figure(t, "17 slow clients", many, "others wait at most %s beside them; they are cut off after %s (target 10 s)", slowest.Round(time.Millisecond), percentile(cut, 100))
}
