package hosts

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"strings"
)

// Image is the image that every host has: Debian's static busybox under all its
// names.
const Image = "weft/busybox"

// importImage gives dockerd the image. Making it from the installed busybox
// needs no registry.
func (h *Host) importImage(ctx context.Context) error {
	layer, err := busyboxLayer(ctx)
	if err != nil {
		return fmt.Errorf("make image: %w", err)
	}
	cmd := h.DockerCommand(ctx, "import", "--change", `CMD ["sh"]`, "-", Image)
	cmd.Stdin = bytes.NewReader(layer)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("docker import: %w: %s", err, bytes.TrimSpace(out))
	}
	return nil
}

func busyboxLayer(ctx context.Context) ([]byte, error) {
	path, err := exec.LookPath("busybox")
	if err != nil {
		return nil, fmt.Errorf("%w; install the package busybox-static", err)
	}
	program, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	applets, err := run(ctx, nil, path, "--list")
	if err != nil {
		return nil, err
	}
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	add := func(hdr tar.Header, content []byte) {
		if err == nil {
			hdr.Size = int64(len(content))
			err = w.WriteHeader(&hdr)
		}
		if err == nil {
			_, err = w.Write(content)
		}
	}
	for _, d := range []string{"bin/", "etc/", "root/", "var/", "srv/"} {
		add(tar.Header{Typeflag: tar.TypeDir, Name: d, Mode: 0o755}, nil)
	}
	add(tar.Header{Typeflag: tar.TypeDir, Name: "tmp/", Mode: 0o1777}, nil)
	add(tar.Header{Name: "etc/passwd", Mode: 0o644}, []byte("root:x:0:0:root:/root:/bin/sh\n"))
	add(tar.Header{Name: "etc/group", Mode: 0o644}, []byte("root:x:0:\n"))
	add(tar.Header{Name: "bin/busybox", Mode: 0o755}, program)
	for _, a := range strings.Fields(applets) {
		if a != "busybox" {
			add(tar.Header{Typeflag: tar.TypeSymlink, Name: "bin/" + a, Linkname: "busybox", Mode: 0o777}, nil)
		}
	}
	if err != nil {
		return nil, err
	}
	return b.Bytes(), w.Close()
}
